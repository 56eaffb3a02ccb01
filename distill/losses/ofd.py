"""OFD: the overhaul of feature distillation (Heo et al., ICCV 2019).

Maps are compared before the ReLU, and what the teacher's ReLU will cut counts only where the student is above it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from distill.losses.inputs import check_pair, teacher_of
from distill.losses.maps import Maps, Stages, chosen_stages, to_grid
from distill.precision import double_precision, full_precision
from distill.protocols import Affine, Criterion, ModelFacts, ModelOutput, Needs, Target

RARE = 1e-3
"""A channel that is negative less often than this has a margin of -3 deviations: its mean is one of too few."""
MARGINS = ("batchnorm", "measured")


def batchnorm_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] of x normal with mean `bias` and deviation |weight|: [C] x 2 -> [C], never above 0; float64 inside.

    bias - s phi(bias/s) / Phi(-bias/s), or -3 s where Phi(-bias/s) is at most 0.001 (a jump: -0.28 s on the other side), or
    min(bias, 0) where s is 0, as of a BatchNorm that starts at zero; the released code divides by it.
    Source: clovaai/overhaul-distillation 76344a8, `get_margin_from_BN`.
    """
    mean, deviation = double_precision(bias), double_precision(weight).abs()
    scaled = mean / deviation.clamp_min(torch.finfo(mean.dtype).tiny)
    density = torch.exp(-scaled.square() / 2) / math.sqrt(2 * math.pi)
    negative = torch.erfc(scaled / math.sqrt(2)) / 2
    margin = torch.where(negative > RARE, mean - deviation * density / negative, -3 * deviation)
    return torch.where(deviation > 0, margin, mean.clamp_max(0)).to(bias.dtype)


def measured_margin(teacher: Tensor) -> Tensor:
    """The mean of each channel's negative values, 0 where it has none: [B, C, H, W] -> [C]."""
    below = full_precision(teacher.detach()).clamp_max(0)
    return below.sum((0, 2, 3)) / (below < 0).sum((0, 2, 3)).clamp_min(1)


def partial_distance(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The sum of (x - t')^2, t' = max(t, margin), where x > t' or t > 0: [B, C, H, W] x 2, [C] -> [B].

    What is at most the margin in both costs nothing. Source: clovaai/overhaul-distillation 76344a8, `distillation_loss`;
    mdistiller a08d46f, `OFD.feat_loss`, is the same in three cases. Computed in float32 (float64 stays): the sum overflows
    float16. No gradient to the teacher. Raises ValueError for shapes that differ.
    """
    check_pair(student, teacher, "pre-activations", dimensions=4)
    mine, theirs = full_precision(student), full_precision(teacher.detach())
    wanted = torch.maximum(theirs, margin.to(theirs)[:, None, None])
    return ((mine - wanted) * ((mine > wanted) | (theirs > 0))).square().sum((1, 2, 3))


class OFD(Criterion):
    """Overhaul of feature distillation (OFD; Heo et al., ICCV 2019): `partial_distance` of stages before their last ReLU.

    Each stage of the student goes through a convolution and BN to the teacher's channels; the last stage weighs 1, the one
    before it 1/2, and so on; batch mean of sums, with weights of 1e-3 (CIFAR) and 1e-4 (ImageNet). Stages are paired from the
    end. The teacher's maps are averaged adaptively to the student's grid, as in mdistiller (the authors' code needs equal
    grids). A stage that no ReLU ends is compared as it is. The authors let the teacher's BatchNorms normalise by the batch in
    training; here a teacher always evaluates.

    Args:
        student: facts of the student: the stages' channels.
        teacher: facts of the teacher: the same, and the BatchNorm before each stage's last activation.
        stages: all that both have, or indices from the end, such as [-1, -2].
        margins: batchnorm, from the BatchNorm before the activation, and measured in stages that have none; or measured, the
            mean of a channel's negative values in the batch at hand (the paper's definition is over the training set).
        kernel_size: of the convolution.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        stages: Stages = "all",
        margins: Literal["batchnorm", "measured"] = "batchnorm",
        kernel_size: int = 1,
    ) -> None:
        super().__init__()
        if margins not in MARGINS:
            raise ValueError(f"margins {margins!r} is unknown; choose one of {', '.join(MARGINS)}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, so that the map keeps its size")
        self.stages = chosen_stages(stages, student, teacher)
        mine, theirs = (Maps(facts, "stages", self.stages).shapes for facts in (student, teacher))
        self.connectors = nn.ModuleList(
            _connector(own.channels, other.channels, kernel_size) for own, other in zip(mine, theirs, strict=True)
        )
        norms = _norms(teacher, self.stages) if margins == "batchnorm" else [None] * len(self.stages)
        for number, norm in enumerate(norms):
            margin = None if norm is None else batchnorm_margin(norm.weight, norm.bias)
            # a fact of the teacher, made again for every run: no state
            self.register_buffer(f"margin{number}", margin, persistent=False)
        self.student_needs = self.teacher_needs = Needs(preactivations=self.stages)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum over stages; and each stage's own, unweighted."""
        teacher = teacher_of(teacher, "ofd")
        total, found = student.logits.new_zeros((), dtype=torch.float32), {}
        for number, (stage, connector) in enumerate(zip(self.stages, self.connectors, strict=True)):
            mine = connector(student.preactivations[stage])
            theirs = to_grid(teacher.preactivations[stage].detach(), *mine.shape[-2:])
            margin = getattr(self, f"margin{number}")
            loss = partial_distance(mine, theirs, measured_margin(theirs) if margin is None else margin).mean()
            found[f"stage{stage}/loss"] = loss.detach()
            total = total + 2.0 ** (number + 1 - len(self.stages)) * loss
        return total, found


def _norms(teacher: ModelFacts, stages: tuple[int, ...]) -> list[Affine | None]:
    """The BatchNorm before each stage's activation; facts without any name none."""
    return [teacher.preactivation_norms[stage] if teacher.preactivation_norms else None for stage in stages]


def _connector(channels: int, wanted: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, weights N(0, 2 / (k k C_t)) as released, then BN."""
    convolution = nn.Conv2d(channels, wanted, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / (kernel_size**2 * wanted)))
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted))
