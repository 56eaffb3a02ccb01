"""NST: neuron selectivity transfer (Huang and Wang, 2017): the student's channels look where the teacher's do."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.contrast import directed
from distill.losses.inputs import check_rows, teacher_of
from distill.losses.maps import Pairs, Source, paired, smaller_grid, to_grid
from distill.precision import no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Target


def nst_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of both maps' channels for each image: [B, C_s, H, W], [B, C_t, H', W'] -> [B].

    Each channel is one unit vector over the cells; the kernel of two is the square of their product, and the loss the mean
    kernel of the teacher's channels with each other, plus the student's, less twice the mean between both. The larger map is
    pooled (adaptive average) to the smaller's grid first. Source: Huang and Wang, arXiv 1707.01219, eq. 5 with the polynomial
    kernel of d 2 and c 0; RepDistiller b84f547, `NSTLoss`, whose scalar is our batch mean. Where we differ: a channel of the
    student that is shorter than 1e-6 gets no gradient (there up to 1e12). Computed in float32 (float64 stays), with no tensor
    larger than [B, C, C]; no gradient to the teacher.
    """
    check_rows(student_map, teacher_map, "nst", dimensions=(4,))
    with no_autocast(student_map):
        grid = smaller_grid(student_map, teacher_map)
        mine, theirs = (_directions(to_grid(each, *grid)) for each in (student_map, teacher_map.detach()))
        return _mean_kernel(theirs, theirs) + _mean_kernel(mine, mine) - 2 * _mean_kernel(mine, theirs)


def _directions(feature_map: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H W], rows of norm 1, or 0 where a channel is."""
    rows = directed(feature_map.flatten(2))
    return rows / torch.linalg.vector_norm(rows, dim=2, keepdim=True).clamp_min(1e-12)


def _mean_kernel(first: Tensor, second: Tensor) -> Tensor:
    """[B, C, D] x [B, C', D] -> [B]."""
    return (first @ second.transpose(1, 2)).square().mean((1, 2))


class NST(Criterion):
    """Neuron selectivity transfer (NST; Huang and Wang, 2017): the batch means of `nst_loss`, summed over pairs of maps.

    Defined for every pair: channels never matter, and the larger map is pooled to the smaller's grid. Where the numbers of
    stages differ they are paired from the end; released code pairs from the front. The papers' weight is 50.

    Args:
        student: facts of the student, whose maps are paired with the teacher's.
        teacher: facts of the teacher.
        source: stages (one map for each resolution) or blocks (the network's own, which released code reads).
        pairs: all that both have, from the end; last; or (student, teacher) indices, such as [[-1, -1], [0, 0]].
    """

    def __init__(self, student: ModelFacts, teacher: ModelFacts, *, source: Source = "stages", pairs: Pairs = "all") -> None:
        super().__init__()
        self.student_maps, self.teacher_maps = paired(student, teacher, source, pairs)
        self.student_needs, self.teacher_needs = self.student_maps.needs, self.teacher_maps.needs

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over pairs of the batch means; and each pair's mean."""
        both = zip(self.student_maps.of(student), self.teacher_maps.of(teacher_of(teacher, "nst")), strict=True)
        losses = [nst_loss(mine, theirs).mean() for mine, theirs in both]
        return torch.stack(losses).sum(), {f"pair{number}/loss": loss.detach() for number, loss in enumerate(losses)}
