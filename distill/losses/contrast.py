"""The contrast of N regions with N others in one sweep over chunks of rows: value and gradient, never N x N numbers at once."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.gathering import all_rows, several_processes

SMALLEST_NORM = 1e-6
"""Shorter vectors have no direction: their cosines are next to 0, and a student's gets no gradient (1e6 and more otherwise)."""
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
"""Similarities held at once unless the caller says otherwise. CPU: 16 MiB in float32, the fastest of 1 to 28 MiB. CUDA:
128 MiB, one chunk for 256 images of 21 regions, since four chunks launch four times the kernels (reckoned, not measured)."""
CHUNK_ELEMENTS_ELSEWHERE = 2**23
MILDEST_EXPONENT = 30.0
"""exp(cosine / temperature) is summed as it is up to this exponent; above, each row is shifted by its largest."""


def default_chunk_rows(columns: Tensor) -> int:
    """Rows of similarities with these columns that are held at once."""
    return max(1, CHUNK_ELEMENTS.get(columns.device.type, CHUNK_ELEMENTS_ELSEWHERE) // len(columns))


Precision = Literal["float32", "tf32"]
"""The precision of the operands of the two matrix products; everything else, and every sum, is float32."""
PRECISIONS = typing.get_args(Precision)


def round_to_tf32_(values: Tensor) -> Tensor:
    """The same float32 memory with 10 bits of mantissa, rounded to the nearest. Not for float64, which stays as it is.

    Tensor cores may cut the lower 13 bits off instead, which makes all values smaller: the gradient of non-negative features
    was then off by 4e-4 of its norm, instead of by 1e-5 (rounded here, on a CPU). Rounded values lose nothing by the cut.
    """
    if values.dtype == torch.float32:
        values.view(torch.int32).add_(0x1000).bitwise_and_(-0x2000)  # a carry into the exponent is the right power of two
    return values


@contextmanager
def tf32_products(device: torch.device, wanted: bool) -> Iterator[None]:
    """Float32 products on NVIDIA GPUs inside may use TF32 units; a switch of the host, read at each launch."""
    if not wanted or device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def directed(rows: Tensor, least: float = SMALLEST_NORM) -> Tensor:
    """The rows [..., D], with those shorter than `least` detached: their gradient would be one over their norm."""
    norms = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
    return torch.where(norms > least, rows, rows.detach())


def unit_rows(vectors: Tensor) -> Tensor:
    """The rows divided by their L2 norm, or by 1e-6 where that is larger."""
    return vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)


def gather_columns(columns: Tensor, categories: Tensor) -> tuple[Tensor, Tensor, int]:
    """All ranks' columns and categories in rank order, and where this rank's begin; every rank must bring as many."""
    if not several_processes():
        return columns, categories, 0
    return all_rows(columns), all_rows(categories), dist.get_rank() * len(columns)


class Contrast(torch.autograd.Function):
    """Mean row loss and mean related cosine of raw student rows with unit columns; the gradient is made with the value.

    `column_categories` is None where the columns are the rows' own: a compiler wants no tensor twice.

    Both need the same exponentials, so one sweep makes both: 4 N Nc D operations instead of 6, and O(N D + chunk) numbers
    kept instead of O(N Nc). Without `want_gradient` (evaluation) the second half is not done. No double backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        columns: Tensor,
        categories: Tensor,
        column_categories: Tensor | None,
        first_own: int,
        temperature: float,
        form: str,
        mask_same_category: bool,
        chunk_rows: int,
        want_gradient: bool,
        precision: Precision,
    ) -> tuple[Tensor, Tensor]:
        """student [N, D], unit columns [M, D], categories int64 [N], column_categories int64 [M] -> two scalars.

        first_own: the column that belongs to the first row; the others follow. chunk_rows: rows that are swept at once.
        """
        count = len(student)
        # the row's own column keeps its precision: its cosine is a sum of its own, and the loss hangs on it most
        operands = round_to_tf32_(columns.clone()) if precision == "tf32" else columns
        others = categories if column_categories is None else column_categories
        losses, cosines = student.new_empty(count), student.new_empty(count)
        gradient = torch.empty_like(student) if want_gradient else None
        with tf32_products(student.device, precision == "tf32"):
            for start in range(0, count, chunk_rows):
                rows = slice(start, min(start + chunk_rows, count))
                own = slice(first_own + rows.start, first_own + rows.stop)
                excluded = _excluded(categories[rows], others, own, mask_same_category)
                losses[rows], cosines[rows], part = _contrast_rows(
                    student[rows], operands, columns[own], excluded, temperature, form, want_gradient, precision
                )
                if gradient is not None and part is not None:
                    torch.div(part, count, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        cosine = cosines.mean()
        ctx.mark_non_differentiable(cosine)
        return losses.mean(), cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream, *[None] * 10)


def _excluded(categories: Tensor, column_categories: Tensor, own: slice, mask_same_category: bool) -> Tensor:
    """Columns that are no negatives of each row, bool [rows, columns]: those of its category, or only its own."""
    if mask_same_category:
        return categories[:, None] == column_categories[None, :]
    index = torch.arange(len(column_categories), device=categories.device)
    return index[own][:, None] == index[None, :]


def _contrast_rows(
    student: Tensor,
    columns: Tensor,
    own: Tensor,
    excluded: Tensor,
    temperature: float,
    form: str,
    want_gradient: bool,
    precision: Precision,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, related cosine and gradient of each row.

    With e_b = exp(s.t_b / T) over the kept columns and e_a that of the row's own: q = e_a / (e_a + sum e_b), the loss is
    -log q = log1p(sum e_b / e_a) (exactly 0, with gradient 0, where nothing is kept) or, as `eq12`, -q; and
    d(-log q)/ds = (sum e_b t_b - (sum e_b) t_a) / ((e_a + sum e_b) T), projected on the sphere of s and divided by |s|.
    """
    norm = torch.linalg.vector_norm(student, dim=1, keepdim=True)
    unit = student / norm.clamp_min(SMALLEST_NORM)
    cosine = (unit * own).sum(1)
    scaled = unit / temperature
    exponent = torch.mm(round_to_tf32_(scaled) if precision == "tf32" else scaled, columns.T)
    del scaled  # as large as the rows: it would be alive beside the products that follow
    own_exponent = cosine / temperature
    sharp = 1 / temperature > MILDEST_EXPONENT
    if sharp:
        exponent.masked_fill_(excluded, -torch.inf)
        largest = torch.maximum(exponent.amax(1), own_exponent)
        exponent.sub_(largest[:, None])
        own_exponent = own_exponent - largest
    kept = exponent.exp_() if sharp else exponent.exp_().masked_fill_(excluded, 0)
    others, mine = kept.sum(1), own_exponent.exp()
    total = others + mine
    likelihood = mine / total
    # log1p(sum e_b / e_a) without the quotient, which overflows where the own exponent is far below the largest
    loss = torch.logaddexp(others.log() - own_exponent, torch.zeros_like(others)) if form == "log" else -likelihood
    if not want_gradient:
        return loss, cosine, None
    if precision == "tf32":
        round_to_tf32_(kept)  # after their sum, which a NaN shows in: here its bits may become a number
    gradient = torch.mm(kept, columns).addcmul_(others[:, None], own, value=-1)
    gradient.div_((total * temperature)[:, None])
    if form == "eq12":
        gradient.mul_(likelihood[:, None])
    gradient.addcmul_((gradient * unit).sum(1, keepdim=True), unit, value=-1)
    return loss, cosine, gradient.div_(norm).masked_fill_(norm <= SMALLEST_NORM, 0)
