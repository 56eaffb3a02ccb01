"""What tests of losses on the relations of a batch share: random rows, gradients, rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_slope(loss, student: Tensor, *rest, **options) -> tuple[Tensor, Tensor]:
    """The loss of each row, and the gradient of their mean."""
    student = student.detach().clone().requires_grad_()
    losses = loss(student, *rest, **options)
    return losses.detach(), torch.autograd.grad(losses.mean(), student)[0]


def rotation(size: int, seed: int = 7) -> Tensor:
    """An orthogonal matrix."""
    return torch.linalg.qr(rows(size, size, seed=seed))[0]
