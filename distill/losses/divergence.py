"""Softened logits in double precision, a block of rows at a time, and losses of rows that bring their gradient along.

A divergence near 0 is a small difference of large terms: in float32 the textbook sum is wrong by 1e-7 of the logarithms, 0.3
percent of a divergence of 1e-4. Taken in blocks that stay in a core's cache, double precision costs less than what autograd
moves through memory for the same sum in float32 (docs/losses.md has the figures), and every formula can stay as it is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.precision import WITHOUT_FLOAT64

BLOCK_ELEMENTS = {"cpu": 2**16}
"""Logits handled at once: 512 KiB in double precision, so that a block's three intermediates stay in a core's caches."""
BLOCK_ELEMENTS_ELSEWHERE = 2**22
LEFT_OUT = -1e30
"""Stands for -inf in the logits of a class that is left out: its weight is exactly 0, and 0 times a difference stays 0."""


class Softened(NamedTuple):
    """exp of N rows of K logits, in double precision."""

    weights: Tensor
    """[N, K]: the exponentials, scaled so that the row's largest is 1; 0 for a class that is left out."""
    normaliser: Tensor
    """[N, 1]: the sum of the weights."""
    log_normaliser: Tensor
    """[N, 1]: log of the sum of the unscaled exponentials."""


Temperature = float | Tensor
"""A number, or a trained one: a tensor of one element, whose value the host never asks for."""


def widen(logits: Tensor, temperature: Temperature, left_out: Tensor | None = None) -> Tensor:
    """logits / T in double precision, as a new tensor [N, K]; left_out int [N, 1] is a class of each row that takes no part."""
    # without double precision a divergence is exact to 1e-7, not to 1e-7 of itself
    wide = torch.float32 if logits.device.type in WITHOUT_FLOAT64 else torch.float64
    scaled = logits.to(wide, copy=True)
    if isinstance(temperature, Tensor) or temperature != 1:
        scaled.mul_(1 / temperature)
    return scaled if left_out is None else scaled.scatter_(-1, left_out, LEFT_OUT)


def soften(scaled: Tensor) -> Softened:
    """Exponentials of what `widen` gave, in its place."""
    largest = scaled.amax(-1, keepdim=True)
    weights = scaled.sub_(largest).exp_()
    normaliser = weights.sum(-1, keepdim=True)
    return Softened(weights, normaliser, largest + normaliser.log())


def compare(
    student: Tensor, teacher: Tensor, temperature: Temperature, left_out: Tensor | None = None
) -> tuple[Softened, Softened, Tensor]:
    """Both softened, and the KL divergence of the student from the teacher in nats, [N, 1]: exactly 0 where they are equal."""
    scaled, teacher_scaled = widen(student, temperature, left_out), widen(teacher, temperature, left_out)
    difference = teacher_scaled - scaled
    mine, theirs = soften(scaled), soften(teacher_scaled)
    expected = difference.mul_(theirs.weights).sum(-1, keepdim=True) / theirs.normaliser
    return mine, theirs, expected + (mine.log_normaliser - theirs.log_normaliser)


def mean_logit(softened: Softened, scaled: Tensor) -> Tensor:
    """The expectation of `scaled` [N, K] under the softened logits, [N, 1]."""
    return torch.linalg.vecdot(softened.weights, scaled).unsqueeze(-1) / softened.normaliser


def cooling(student: Tensor, teacher: Tensor, mine: Softened, theirs: Softened) -> Tensor:
    """-T dKL/dT = Cov_t(u - v, u) + E_s v - E_t v, [N, 1].

    student = v and teacher = u are logits / T as `widen` gives them, `mine` and `theirs` what `soften` makes of these.
    """
    difference, centred = teacher - student, teacher - mean_logit(theirs, teacher)
    covariance = mean_logit(theirs, difference.mul_(centred))
    return covariance + mean_logit(mine, student) - mean_logit(theirs, student)


def weighted_excess(
    student: Softened, teacher: Softened, student_factor: Tensor | float, teacher_factor: Tensor | float
) -> Tensor:
    """student_factor p_s - teacher_factor p_t: [N, K], in the place of both weights. Exactly 0 where they are equal."""
    theirs = teacher.weights.mul_(teacher_factor / teacher.normaliser)
    return student.weights.mul_(student_factor / student.normaliser).sub_(theirs)


class RowValues(NamedTuple):
    """What a loss of rows gives for a block of n rows; the derivatives are None where nobody wants them."""

    losses: Tensor
    """[n, 1]"""
    gradient: Tensor | None = None
    """[n, K], by the student's logits."""
    slope: Tensor | None = None
    """[n, 1], by the temperature, where that is a tensor."""


Rows = Callable[[Tensor, Tensor, Tensor | None, bool], RowValues]
"""(student [n, K], teacher [n, K], labels [n, 1] or None, want derivatives) -> losses of the rows and their derivatives."""


class RowLoss(torch.autograd.Function):
    """A loss of each row with its gradient, made in one sweep over blocks of rows; no double backward.

    Keeps one tensor of the logits' size for the backward pass, none in evaluation; what comes in between has a block's size.
    `temperature`, where it is trained, is the wide scalar that `rows` divide by; its gradient is the sum of the rows' slopes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        temperature: Tensor | None,
        rows: Rows,
        want_gradient: bool,
    ) -> Tensor:
        """student, teacher [N, K]; labels [N] or None; `rows` gives the losses and gradients of a block -> [N], one a row."""
        losses = student.new_empty(len(student), 1)
        gradient = torch.empty_like(student) if want_gradient else None
        slopes = None if temperature is None else temperature.new_empty(len(student), 1)
        step = _block_rows(student)
        for start in range(0, len(student), step):
            block = slice(start, start + step)
            own = None if labels is None else labels[block]
            losses[block], part, slope = rows(student[block], teacher[block], own, want_gradient)
            if gradient is not None and part is not None:
                gradient[block] = part
            if slopes is not None and slope is not None:
                slopes[block] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient, slopes)
        return losses.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, slopes = ctx.saved_tensors
        own = None if slopes is None else (slopes.squeeze(1) * upstream).sum()
        return gradient * upstream[:, None], None, None, own, None, None


def _block_rows(logits: Tensor) -> int:
    # a compiler fuses the whole; a loop over blocks would only be unrolled
    if torch.compiler.is_compiling():
        return len(logits)
    return max(1, BLOCK_ELEMENTS.get(logits.device.type, BLOCK_ELEMENTS_ELSEWHERE) // logits.shape[1])
