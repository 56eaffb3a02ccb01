"""VID: variational information distillation (Ahn et al., CVPR 2019): how likely the teacher's maps are, given the student's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.inputs import check_pair, teacher_of
from distill.losses.maps import Pairs, Source, paired, smaller_grid, to_grid
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Target

LEAST_VARIANCE = 1e-5


def vid_loss(predicted: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """The mean over channels and cells of ((mu - t)^2 / v + log v) / 2 for each image: [B, C, H, W] x 2, [C] -> [B].

    The negative log-likelihood of the teacher's map t under a Gaussian of mean mu and of one variance v for each channel, less
    its constant; it can be negative. Source: Ahn et al., eq. 5 and 6; RepDistiller b84f547, `VIDLoss`, whose scalar is our
    batch mean. Computed in float32 (float64 stays); no gradient to the teacher. Raises ValueError for shapes that differ.
    """
    check_pair(predicted, teacher, "vid", dimensions=4)
    with no_autocast(predicted):
        spread = full_precision(variance)[:, None, None]
        apart = (full_precision(predicted) - full_precision(teacher.detach())).square()
        return ((apart / spread + spread.log()) / 2).mean((1, 2, 3))


class VID(Criterion):
    """Variational information distillation (Ahn et al., CVPR 2019): the batch means of `vid_loss`, summed over pairs of maps.

    Three 1x1 convolutions with ReLUs between them predict the teacher's map from the student's, and each channel's variance is
    trained (mdistiller forgets to hand it to its optimiser). The larger map is pooled to the smaller's grid, so the loss is
    defined for every pair. Where the numbers of stages differ they are paired from the end; released code pairs from the
    front. The papers' weight is 1.

    Args:
        student: facts of the student, whose maps are paired with the teacher's.
        teacher: facts of the teacher.
        source: stages (one map for each resolution) or blocks (the network's own, which released code reads).
        pairs: all that both have, from the end; last; or (student, teacher) indices, such as [[-1, -1], [0, 0]].
        initial_variance: of every channel.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        source: Source = "stages",
        pairs: Pairs = "all",
        initial_variance: float = 5.0,
    ) -> None:
        super().__init__()
        if not LEAST_VARIANCE < initial_variance < math.inf:
            raise ValueError(f"initial_variance {initial_variance} must be finite and above {LEAST_VARIANCE}")
        self.student_maps, self.teacher_maps = paired(student, teacher, source, pairs)
        self.student_needs, self.teacher_needs = self.student_maps.needs, self.teacher_maps.needs
        both = zip(self.student_maps.shapes, self.teacher_maps.shapes, strict=True)
        self.predict = nn.ModuleList(_regressor(mine.channels, theirs.channels) for mine, theirs in both)
        start = math.log(math.expm1(initial_variance - LEAST_VARIANCE))  # what softplus makes that variance of
        self.spreads = nn.ParameterList(torch.full((shape.channels,), start) for shape in self.teacher_maps.shapes)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over pairs; and each pair's mean and mean variance."""
        losses, statistics = [], {}
        both = zip(self.student_maps.of(student), self.teacher_maps.of(teacher_of(teacher, "vid")), strict=True)
        for number, ((mine, theirs), predict, spread) in enumerate(zip(both, self.predict, self.spreads, strict=True)):
            grid = smaller_grid(mine, theirs)
            variance = F.softplus(spread) + LEAST_VARIANCE
            loss = vid_loss(predict(to_grid(mine, *grid)), to_grid(theirs.detach(), *grid), variance).mean()
            losses.append(loss)
            statistics[f"pair{number}/loss"] = loss.detach()
            statistics[f"pair{number}/variance"] = variance.detach().mean()
        return torch.stack(losses).sum(), statistics


def _regressor(channels: int, wanted: int) -> nn.Sequential:
    """Convolutions without bias; PyTorch's own initialisation."""
    first, second, third = (nn.Conv2d(width, wanted, 1, bias=False) for width in (channels, wanted, wanted))
    return nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True), third)
