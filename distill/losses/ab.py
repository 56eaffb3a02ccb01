"""AB: activation boundaries (Heo et al., AAAI 2019): the student's neurons fire where the teacher's do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.losses.fitnet import build_regressor, matched
from distill.losses.inputs import check_pair, teacher_of
from distill.losses.maps import Maps, Match, Stages, chosen_stages
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Target

SCALE = 3e-3
"""Of the released code, which multiplies the sum over an image's neurons by 3 / 1000."""


def ab_loss(student: Tensor, teacher: Tensor, margin: float = 1.0) -> Tensor:
    """The sum over neurons of the squared distance to the right side of 0: pre-activations [B, C, H, W] x 2 -> [B].

    (s + m)^2 where the teacher's neuron is silent (t <= 0) and s > -m; (s - m)^2 where it fires and s <= m; else 0. How much it
    fires does not matter. Source: Heo et al., eq. 5; RepDistiller b84f547, `ABLoss`, but for its factors. Computed in float32
    (float64 stays): the sum overflows float16. No gradient to the teacher. Raises ValueError for shapes that differ.
    """
    check_pair(student, teacher, "ab", dimensions=4)
    with no_autocast(student):
        mine = full_precision(student)
        short = torch.where(teacher.detach() > 0, (margin - mine).clamp_min(0), (mine + margin).clamp_min(0))
        return short.square().sum((1, 2, 3))


class AB(Criterion):
    """Activation boundaries (AB; Heo et al., AAAI 2019): the batch means of `ab_loss` times 0.003, summed over stages.

    Stages are compared before the ReLU that ends them, paired from the end; the last weighs 1, the one before it 1/2, and so
    on. Where a pair's shapes differ, a convolution and BN bring the student's to the teacher's (`FitNetRegressor` without its
    ReLU). It is an initialisation: as published, the first 30 epochs train it alone (weight 1, `stop_epoch` 30) and then the
    classification alone (`cross_entropy.start_epoch` 30).

    Args:
        student: facts of the student: the stages' shapes.
        teacher: facts of the teacher: the same.
        stages: all that both have, or indices from the end, such as [-1, -2].
        match: convolution (as released) or pool (the larger map is pooled to the smaller, then 1x1: fewer parameters).
        margin: how far on its side of 0 a neuron has to be.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        stages: Stages = "all",
        match: Match = "convolution",
        margin: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= margin < float("inf"):
            raise ValueError(f"margin {margin} must be finite and not negative")
        self.stages = chosen_stages(stages, student, teacher)
        self.match, self.margin = match, margin
        mine, theirs = (Maps(facts, "stages", self.stages).shapes for facts in (student, teacher))
        self.connectors = nn.ModuleList(
            nn.Identity() if own == other else build_regressor(own, other, match, relu=False)
            for own, other in zip(mine, theirs, strict=True)
        )
        self.student_needs = self.teacher_needs = Needs(preactivations=self.stages)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over stages; and each stage's own, unweighted."""
        teacher = teacher_of(teacher, "ab")
        losses, statistics = [], {}
        for number, (stage, connector) in enumerate(zip(self.stages, self.connectors, strict=True)):
            mine, theirs = matched(student.preactivations[stage], teacher.preactivations[stage], self.match)
            loss = SCALE * ab_loss(connector(mine), theirs, self.margin).mean()
            losses.append(2.0 ** (number + 1 - len(self.stages)) * loss)
            statistics[f"stage{stage}/loss"] = loss.detach()
        return torch.stack(losses).sum(), statistics
