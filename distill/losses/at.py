"""Attention transfer (AT): where the teacher's maps are large, the student's are."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.contrast import directed
from distill.losses.inputs import check_rows, teacher_of
from distill.losses.maps import Pairs, Source, paired, to_grid
from distill.precision import no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Target

EPS = 1e-12


def at_loss(student_map: Tensor, teacher_map: Tensor, power: int = 2) -> Tensor:
    """The mean over cells of (Q_s - Q_t)^2 for each image: [B, C_s, H_s, W_s] and [B, C_t, H_t, W_t] -> [B].

    Q is the mean over channels of F^power, flattened and divided by its L2 norm, or by 1e-12 where that is larger. The larger
    of two maps is first pooled (adaptive average) to the smaller's height and width. Source: Zagoruyko and Komodakis, ICLR
    2017; their code and mdistiller a08d46f, `AT.at_loss`: the mean of squares where the paper has a norm, and no absolute
    value, so that at an odd power channels of both signs cancel. Where we differ: maps that are not square are pooled side by
    side; a student whose Q is shorter than 1e-12 gets no gradient (there 2e11 at power 1, 0 at even powers). Computed in
    float32 (float64 stays): F^2 overflows float16 above 255. No gradient to the teacher.
    """
    check_rows(student_map, teacher_map, "at", dimensions=(4,))
    check_power(power)
    height, width = (min(sides) for sides in zip(student_map.shape[-2:], teacher_map.shape[-2:], strict=True))
    with no_autocast(student_map):
        mine, theirs = (attention_vector(to_grid(each, height, width), power) for each in (student_map, teacher_map.detach()))
        return (mine - theirs).square().mean(1)


def check_power(power: int) -> None:
    """Raises ValueError unless the power is at least 1."""
    if power < 1:
        raise ValueError(f"power {power} must be at least 1")


def attention_vector(feature_map: Tensor, power: int) -> Tensor:
    """The mean over channels of the map's powers, each row of norm 1: [B, C, H, W] -> [B, H W]."""
    attention = directed(feature_map.pow(power).mean(1).flatten(1), least=EPS)
    return attention / torch.linalg.vector_norm(attention, dim=1, keepdim=True).clamp_min(EPS)


class AT(Criterion):
    """Attention transfer (Zagoruyko and Komodakis, ICLR 2017), summed over pairs of maps.

    Defined for every pair: channels never matter, and the larger map is pooled to the smaller's grid. Where the numbers of
    stages differ they are paired from the end; released code pairs from the front: pairs [[0, 0], [1, 1], ...]. The papers'
    weight is 1000.

    Args:
        student: facts of the student, whose maps are paired with the teacher's.
        teacher: facts of the teacher.
        source: stages (one map for each resolution) or blocks (the network's own, which released code reads).
        pairs: all that both have, from the end; last; or (student, teacher) indices, such as [[-1, -1], [0, 0]].
        power: of the map's entries.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        source: Source = "stages",
        pairs: Pairs = "all",
        power: int = 2,
    ) -> None:
        super().__init__()
        check_power(power)
        self.power = power
        self.student_maps, self.teacher_maps = paired(student, teacher, source, pairs)
        self.student_needs, self.teacher_needs = self.student_maps.needs, self.teacher_maps.needs

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over pairs of the batch means; and each pair's mean."""
        teacher = teacher_of(teacher, "at")
        both = zip(self.student_maps.of(student), self.teacher_maps.of(teacher), strict=True)
        losses = [at_loss(mine, theirs, self.power).mean() for mine, theirs in both]
        return torch.stack(losses).sum(), {f"pair{number}/loss": loss.detach() for number, loss in enumerate(losses)}
