"""MSDCRD: multi-scale decoupled contrastive representation distillation (arXiv 2502.05835v1).

Regions of the student's map, projected to the teacher's channels, are contrasted with regions of the teacher's map: the same
region of the same image is the positive, regions to which the teacher's own head gives another category are negatives, all
others are left out. Of a teacher without a classifier the images' labels can take the place of these categories.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from distill.losses.contrast import PRECISIONS, Contrast, Precision, default_chunk_rows, gather_columns, unit_rows
from distill.losses.inputs import check_pair, check_temperature, teacher_of
from distill.losses.projector import Projector, build_projector
from distill.precision import full_precision, full_precision_type, no_autocast
from distill.protocols import Criterion, Gathered, ModelFacts, ModelOutput, Needs, Regions, Target
from distill.regions import Grid, cached_matrix, pool, region_matrix, scale_slices, usable_scales

FORMS = ("log", "eq12")
CATEGORIES = ("teacher", "labels")


def contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    categories: Tensor,
    temperature: float = 1.0,
    form: str = "log",
    mask_same_category: bool = True,
    gather: bool = False,
    chunk_rows: int | None = None,
    precision: Precision = "float32",
) -> Tensor:
    """The mean over student rows of -log q, q = exp(s.t_own / T) / (exp(s.t_own / T) + sum over negatives of exp(s.t / T)).

    student, teacher [N, D], normalised here; categories int [N]. The negatives of a row are the teacher rows of another
    category (eq. 9-11); all rows but its own when `mask_same_category` is off. `form="eq12"` is eq. 12 as printed, -q without
    the logarithm: its gradient is about N times smaller. The paper has no temperature: 1. `gather` adds the other ranks'
    teacher rows and categories as columns; every rank must bring the same number of rows, and the mean over ranks is the loss
    of the joined batch. `chunk_rows` bounds memory at O(N D + chunk_rows N) numbers; None chooses. `precision="tf32"` rounds
    the operands of both products to 10 bits of mantissa, for the tensor cores of NVIDIA GPUs; sums stay float32.
    Zero vectors have cosine 0 with everything and get no gradient. One category only: exactly 0, with gradient 0.
    Computed in float32 (float64 stays), no gradient to the teacher. Raises ValueError for shapes, types and names that cannot
    be right.
    """
    loss, _ = contrast(student, teacher, categories, temperature, form, mask_same_category, gather, chunk_rows, precision)
    return loss


def contrast(
    student: Tensor,
    teacher: Tensor,
    categories: Tensor,
    temperature: float = 1.0,
    form: str = "log",
    mask_same_category: bool = True,
    gather: bool = False,
    chunk_rows: int | None = None,
    precision: Precision = "float32",
) -> tuple[Tensor, Tensor]:
    """`contrastive_loss`, and the mean cosine of student rows with their own teacher rows, detached."""
    check_pair(student, teacher, "contrast", dimensions=2)
    check_categories(categories, len(student))
    check_temperature(temperature)
    check_form(form, chunk_rows, precision)
    with no_autocast(student):
        with torch.no_grad():
            columns = unit_rows(full_precision(teacher.detach()))
            column_categories, first_own = None, 0
            if gather:
                columns, column_categories, first_own = gather_columns(columns, categories)
        student = full_precision(student)
        rows = chunk_rows or default_chunk_rows(columns)
        want_gradient = torch.is_grad_enabled() and student.requires_grad
        loss, cosine = Contrast.apply(
            student,
            columns.to(student.dtype),
            categories,
            column_categories,
            first_own,
            temperature,
            form,
            mask_same_category,
            rows,
            want_gradient,
            precision,
        )
    return loss, cosine


def check_categories(categories: Tensor, rows: int) -> None:
    """Raises ValueError unless there is one integer category for each row."""
    if categories.shape != (rows,):
        raise ValueError(f"categories {list(categories.shape)} must be [{rows}], one for each row")
    if categories.is_floating_point() or categories.is_complex():
        raise ValueError(f"categories are {categories.dtype}; they must be integers")


def check_form(form: str, chunk_rows: int | None, precision: str) -> None:
    """Raises ValueError for a form or a precision that does not exist and a chunk without rows."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows {chunk_rows} must be at least 1")


def mean_negatives(categories: Tensor, mask_same_category: bool) -> Tensor:
    """The mean number of negatives per row among these rows, without looking at pairs: a scalar."""
    count = len(categories)
    if not mask_same_category:
        return torch.full((), count - 1.0, device=categories.device)
    ordered = categories.sort().values
    same = torch.searchsorted(ordered, categories, right=True) - torch.searchsorted(ordered, categories)
    return count - same.float().mean()


def chosen_stages(stages: Literal["last", "all"] | tuple[int, ...], pairs: int) -> tuple[int, ...]:
    """The stages as indices from the end, -1 first as given or for `all`; raises ValueError for one that a model lacks."""
    if pairs < 1:
        raise ValueError("msdcrd compares stages of both models, and one of them has none")
    if stages == "last":
        return (-1,)
    if stages == "all":
        return tuple(range(-1, -pairs - 1, -1))
    if isinstance(stages, str) or not stages or len(set(stages)) < len(stages):
        raise ValueError(f"stages {stages!r} must be 'last', 'all' or indices from the end, each once, such as [-1, -2]")
    if not all(-pairs <= stage <= -1 for stage in stages):
        raise ValueError(
            f"stages {list(stages)} must lie in {-pairs}..-1, counted from the end: the pair has {pairs} in common"
        )
    return tuple(stages)


def chosen_categories(categories: str, mask_same_category: bool, teacher: ModelFacts) -> str:
    """What tells regions apart: `teacher`, `labels`, or `none` without a mask. ValueError where the teacher cannot."""
    if categories not in CATEGORIES:
        raise ValueError(f"categories {categories!r} is unknown; choose one of {', '.join(CATEGORIES)}")
    if not mask_same_category:
        return "none"
    if categories == "teacher" and teacher.num_classes < 1:
        raise ValueError(
            "msdcrd takes the categories of regions from the teacher's classifier, and this teacher has none; "
            "set categories to labels, or mask_same_category to false"
        )
    return categories


class MSDCRD(Criterion):
    """Multi-scale decoupled contrastive representation distillation (arXiv 2502.05835v1).

    Args:
        student: facts of the student; its stages give the projectors' inputs.
        teacher: facts of the teacher; its stages are paired with the student's from the end.
        stages: last, all, or indices from the end, such as [-1, -2].
        scales: grids of regions; one larger than either map of a stage is left out for that stage.
        windows: sizes of sliding windows over the teacher's last map, taken at the same relative places of every map.
        stride: of the windows.
        temperature: what cosines are divided by; the paper has none, 1.
        form: log, or eq12 as printed in the paper, without the logarithm.
        mask_same_category: leave other regions of the same category out of the negatives; off in Table 4's "CL" and "CL+MSP".
        categories: of regions: `teacher`, what its classifier says of each, as the paper; `labels`, that of the image for all
            of its regions. A teacher without a classifier takes `labels`, or no mask.
        gather: take negatives from all processes.
        chunk_rows: rows of similarities held at once; None chooses.
        precision: of the operands of the two products; tf32 is for NVIDIA GPUs: gradients to 2e-5 / temperature of their norm.
        kernel_size: of the attention projector's second convolution; 3 as counted in Table 7, 1 as in the paper's text.
        projector: attention, or one of Table 5's others; none only where both have the same channels.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        stages: Literal["last", "all"] | tuple[int, ...] = "all",
        scales: tuple[int, ...] = (1, 2, 4),
        windows: tuple[int, ...] = (),
        stride: int = 1,
        temperature: float = 1.0,
        form: Literal["log", "eq12"] = "log",
        mask_same_category: bool = True,
        categories: Literal["teacher", "labels"] = "teacher",
        gather: bool = False,
        chunk_rows: int | None = None,
        precision: Precision = "float32",
        kernel_size: int = 3,
        projector: Projector = "attention",
    ) -> None:
        super().__init__()
        self.categories = chosen_categories(categories, mask_same_category, teacher)
        check_temperature(temperature)
        check_form(form, chunk_rows, precision)
        self.stages = chosen_stages(stages, min(len(student.stages), len(teacher.stages)))
        self.regions = Regions(tuple(scales), "area", tuple(windows), stride)
        largest = max(windows, default=1)
        region_matrix(largest, largest, self.regions)  # raises for regions that no map can have
        self.mask_same_category, self.gather = mask_same_category, gather
        self.accepts_soft_labels = self.categories != "labels"
        self._contrasts: list[Gathered] = []
        self.contrast = partial(
            contrast,
            temperature=temperature,
            form=form,
            mask_same_category=mask_same_category,
            gather=gather,
            chunk_rows=chunk_rows,
            precision=precision,
        )
        self.projectors = nn.ModuleList(
            build_projector(projector, student.stages[stage].channels, teacher.stages[stage].channels, kernel_size)
            for stage in self.stages
        )
        self.student_needs = Needs(stages=self.stages)
        self.teacher_needs = Needs(region_logits=(self.regions,) if self.categories == "teacher" else (), stages=self.stages)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over stages (eq. 13); and each stage's loss, mean related cosine and mean number of this rank's negatives."""
        teacher = teacher_of(teacher, "msdcrd")
        self._contrasts.clear()
        total, statistics = student.logits.new_zeros((), dtype=torch.float32), {}
        for stage, projector in zip(self.stages, self.projectors, strict=True):
            mine, theirs = projector(student.stages[stage]), teacher.stages[stage].detach()
            loss, cosine, negatives = self._stage_loss(mine, theirs, teacher, target)
            total = total + loss
            statistics[f"stage{stage}/loss"] = loss.detach()
            statistics[f"stage{stage}/related_cosine"] = cosine
            statistics[f"stage{stage}/negatives"] = negatives
        return total, statistics

    def advice(self) -> str:
        """Fewer stages."""
        return "--loss.msdcrd.stages last leaves the earlier maps out"

    def traffic(self) -> tuple[Gathered, ...]:
        """The teacher's rows of each stage, with a category each."""
        return tuple(self._contrasts)

    def _stage_loss(self, mine: Tensor, theirs: Tensor, teacher: ModelOutput, target: Target) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, mean related cosine and mean number of negatives of one pair of [B, C, H, W] maps."""
        grids = (_grid(mine), _grid(theirs))
        scales = usable_scales(self.regions.scales, *grids)
        if not scales and not self.regions.windows:
            raise ValueError(f"scales {list(self.regions.scales)} are all larger than a {min(grids)} map; add a smaller scale")
        shape = (scales, self.regions.windows, self.regions.stride, _grid(teacher.feature_map))
        regions, targets = (
            pool(each, cached_matrix(grid, *shape, full_precision_type(each), each.device)).flatten(0, 1)
            for each, grid in zip((mine, theirs), grids, strict=True)
        )
        categories = self._categories(teacher, target, scales, len(regions))
        self._contrasts.append(Gathered(len(targets), targets.shape[1], self.gather))
        loss, cosine = self.contrast(regions, targets, categories)
        return loss, cosine, mean_negatives(categories, self.mask_same_category)

    def _categories(self, teacher: ModelOutput, target: Target, scales: tuple[int, ...], rows: int) -> Tensor:
        """The category of each region of each image, for every stage alike: the image's label, or what the teacher's own head
        makes of the region of its last map."""
        if self.categories == "none":
            return torch.zeros(rows, dtype=torch.int64, device=teacher.feature_map.device)
        if self.categories == "labels":
            return target.labels.repeat_interleave(rows // len(target.labels))
        predicted = teacher.region_logits[self.regions].detach().argmax(-1)
        slices = scale_slices(self.regions.scales)
        kept = [predicted[:, slices[scale]] for scale in scales]
        first_window = sum(scale * scale for scale in self.regions.scales)
        return torch.cat([*kept, predicted[:, first_window:]], dim=1).flatten()


def _grid(feature_map: Tensor) -> Grid:
    return (feature_map.shape[-2], feature_map.shape[-1])
