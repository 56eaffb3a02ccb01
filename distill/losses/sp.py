"""Similarity-preserving distillation (SP): the images that are alike to the teacher are alike to the student."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from distill.losses.contrast import directed
from distill.losses.gathering import joined_batch
from distill.losses.inputs import check_rows, teacher_of
from distill.losses.maps import Maps, Source
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, Gathered, ModelFacts, ModelOutput, Needs, Regions, Target
from distill.regions import Mode, pooling_matrix

EPS = 1e-12
READINGS = ("mean", "vector", "rows")
Reading = Literal["mean", "vector", "rows"]


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over j of (G_s,ij - G_t,ij)^2 for each image i: [B, ...] x 2, flattened, of any sizes -> [B].

    G = X X^T of the flattened rows X; each row of G is divided by its L2 norm, or by 1e-12 where that is larger. Source: Tung
    and Mori, ICCV 2019; RepDistiller b84f547, `Similarity`, whose scalar is our batch mean. Where we differ: a student row
    shorter than 1e-6 gets no gradient (there: 1e11, one over the 1e-12 above). One image: exactly 0. Computed in float32
    (float64 stays): in float16 G overflows from features of size 2 on. No gradient to the teacher.
    """
    check_rows(student, teacher, "sp", dimensions=(2, 3, 4))
    with no_autocast(student):
        return _similarity_loss(student.flatten(1), teacher.detach().flatten(1))


def sdsp_loss(student_regions: Tensor, teacher_regions: Tensor, reading: Reading = "mean") -> Tensor:
    """SP on pooled regions, [B, R, C_s] and [B, R, C_t]: [B, R] (`mean`, `rows`) or [B] (`vector`); the loss is its mean.

    SDD's appendix (arXiv 2403.13512) names it SD-SP in one sentence and released no code. The three readings: `mean`, SP of
    each region by itself; `vector`, SP of one long vector of all regions of an image; `rows`, SP of B R rows as one batch.
    """
    check_rows(student_regions, teacher_regions, "sdsp", dimensions=(3,))
    if student_regions.shape[1] != teacher_regions.shape[1]:
        raise ValueError(f"sdsp: {student_regions.shape[1]} and {teacher_regions.shape[1]} regions; both must have the same")
    if reading not in READINGS:
        raise ValueError(f"reading {reading!r} is unknown; choose one of {', '.join(READINGS)}")
    if reading == "vector":
        return sp_loss(student_regions, teacher_regions)
    if reading == "rows":
        return sp_loss(student_regions.flatten(0, 1), teacher_regions.flatten(0, 1)).unflatten(0, student_regions.shape[:2])
    with no_autocast(student_regions):
        return _similarity_loss(student_regions.transpose(0, 1), teacher_regions.detach().transpose(0, 1)).T


def _similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """[..., B, D_s] and [..., B, D_t] -> [..., B]."""
    return (_similarities(student) - _similarities(teacher)).square().mean(-1)


def _similarities(rows: Tensor) -> Tensor:
    """The rows' products with each other, each row of them of norm 1: [..., B, D] -> [..., B, B]."""
    rows = directed(full_precision(rows))
    products = rows @ rows.transpose(-1, -2)
    return products / torch.linalg.vector_norm(products, dim=-1, keepdim=True).clamp_min(EPS)


class SP(Criterion):
    """Similarity-preserving distillation (Tung and Mori, ICCV 2019) on the last map, or on pooled regions of it (SD-SP).

    Defined for every pair: channels, grids and tokens of the two maps need not match. The papers' weight is 3000.

    Args:
        student: facts of the student; only its blocks are looked at.
        teacher: facts of the teacher, likewise.
        source: stages (the map that the head reads) or blocks (the network's last own map, which released code reads).
        scales: grids of regions to compare instead of the whole map (SD-SP); empty is the whole map.
        pooling: of the regions; area, adaptive, or cascade (the released code of SDD).
        reading: how regions are compared; mean (each by itself), vector (all of an image as one) or rows (all as one batch).
        gather: compare with the images of all processes.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        source: Source = "stages",
        scales: tuple[int, ...] = (),
        pooling: Mode = "area",
        reading: Reading = "mean",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if scales and source != "stages":
            raise ValueError("scales are regions of the map that the head reads; leave source at 'stages', or scales empty")
        if reading not in READINGS:
            raise ValueError(f"reading {reading!r} is unknown; choose one of {', '.join(READINGS)}")
        self.reading, self.gather = reading, gather
        self.maps = [Maps(facts, source, (-1,)) for facts in (student, teacher)]
        self.student_needs, self.teacher_needs = (maps.needs for maps in self.maps)
        self.regions: Regions | None = None
        if scales:
            pooling_matrix(1, 1, scales, pooling)  # raises for scales and a pooling that no map can have
            self.regions = Regions(tuple(scales), pooling)
            self.student_needs = self.teacher_needs = Needs(region_features=(self.regions,))
        self._traffic: tuple[Gathered, ...] = ()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over images (and regions), of this process or of all."""
        outputs = (student, teacher_of(teacher, "sp"))
        if self.regions is not None:
            mine, theirs = (output.region_features[self.regions] for output in outputs)
        else:
            mine, theirs = (maps.of(output)[0] for maps, output in zip(self.maps, outputs, strict=True))
        self._traffic = tuple(Gathered(len(each), each[0].numel(), self.gather) for each in (mine, theirs))
        if self.gather:
            mine, theirs = joined_batch(mine), joined_batch(theirs.detach())
        losses = sp_loss(mine, theirs) if self.regions is None else sdsp_loss(mine, theirs, self.reading)
        return losses.mean(), {}

    def advice(self) -> str:
        """Fewer regions, or none."""
        return "--loss.sp.scales '[1]' compares pooled vectors only"

    def traffic(self) -> tuple[Gathered, ...]:
        """Both models' rows."""
        return self._traffic
