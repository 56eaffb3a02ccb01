"""FSP: the flow of solution procedure (Yim et al., CVPR 2017): how each stage's channels go with those of the next one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distill.losses.inputs import check_rows, teacher_of
from distill.losses.maps import Maps, Stages, chosen_stages, smaller_grid, to_grid
from distill.precision import no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Target


def fsp_matrix(lower: Tensor, upper: Tensor) -> Tensor:
    """The mean over cells of the products of two maps' channels: [B, C, H, W], [B, D, H', W'] -> [B, D, C].

    The larger map is pooled (adaptive average) to the smaller's grid first. Source: Yim et al., eq. 1; RepDistiller b84f547,
    `FSP.compute_fsp`, whose intermediate tensor of D C H W numbers for each image ours does without. Computed in float32
    (float64 stays). Raises ValueError for maps of other images.
    """
    check_rows(lower, upper, "fsp", dimensions=(4,))
    with no_autocast(lower):
        grid = smaller_grid(lower, upper)
        below, above = (to_grid(each, *grid).flatten(2) for each in (lower, upper))
        return above @ below.transpose(1, 2) / below.shape[2]


class FSP(Criterion):
    """The flow of solution procedure (FSP; Yim et al., CVPR 2017): mean squared differences of `fsp_matrix`, summed.

    Every two neighbouring stages give a matrix, which the two models can compare only where their stages have equal channels:
    nets of one family. It is an initialisation: as published, the first 30 epochs train it alone (weight 1, `stop_epoch` 30)
    and then the classification alone (`cross_entropy.start_epoch` 30). Released code has one more matrix, from the stem to the
    first stage; here a map of the same resolution as the stage above it is none.

    Args:
        student: facts of the student: the stages' channels.
        teacher: facts of the teacher: the same ones.
        stages: all that both have, or indices from the end, such as [-1, -2]; at least two.
    """

    def __init__(self, student: ModelFacts, teacher: ModelFacts, *, stages: Stages = "all") -> None:
        super().__init__()
        found = chosen_stages(stages, student, teacher)
        if len(found) < 2:
            raise ValueError(f"fsp compares neighbouring stages and got {list(found)}; both models need two, such as [-2, -1]")
        self.student_maps, self.teacher_maps = (Maps(facts, "stages", found) for facts in (student, teacher))
        mine, theirs = ([shape.channels for shape in maps.shapes] for maps in (self.student_maps, self.teacher_maps))
        if mine != theirs:
            raise ValueError(
                f"fsp compares stages of equal channels; the student's have {mine} and the teacher's {theirs}: take nets of one"
                " family and width, or another loss on maps, such as ab"
            )
        self.student_needs, self.teacher_needs = self.student_maps.needs, self.teacher_maps.needs

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over matrices of the batch means; and each of them."""
        mine = _matrices(self.student_maps.of(student))
        theirs = _matrices([each.detach() for each in self.teacher_maps.of(teacher_of(teacher, "fsp"))])
        losses = [(own - other).square().mean() for own, other in zip(mine, theirs, strict=True)]
        return torch.stack(losses).sum(), {f"matrix{number}/loss": loss.detach() for number, loss in enumerate(losses)}


def _matrices(maps: list[Tensor]) -> list[Tensor]:
    return [fsp_matrix(lower, upper) for lower, upper in pairwise(maps)]
