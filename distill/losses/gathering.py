"""Rows of every process, for losses that compare the images of a batch with each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """True where there are other processes to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_rows(rows: Tensor) -> Tensor:
    """The rows [N, ...] of every rank, joined in rank order: [W N, ...], without a gradient; the rows alone where W is 1.

    Raises ValueError where ranks bring different numbers of rows the first time that this rank brings so many; later steps do
    not ask again, for the answer makes the host wait.
    """
    if not several_processes():
        return rows.detach()
    world = dist.get_world_size()
    _check_equal_counts(len(rows), world, rows.device)
    everyone = rows.new_empty(world * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows.detach().contiguous())
    return everyone


def joined_batch(rows: Tensor) -> Tensor:
    """`all_rows` with a gradient to this rank's own, times W.

    Every rank then computes the same loss of the joined batch, whose mean over ranks it is. DDP's mean of the gradients divides
    each rank's part by W, hence the factor.
    """
    return _JoinedBatch.apply(rows) if several_processes() else rows


class _JoinedBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = len(rows)
        return all_rows(rows)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        first = dist.get_rank() * ctx.rows
        return upstream[first : first + ctx.rows] * dist.get_world_size()


@lru_cache(maxsize=64)
def _check_equal_counts(count: int, world: int, device: torch.device) -> None:
    everyones = torch.empty(world, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(everyones, torch.tensor([count], device=device))
    counts = everyones.tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"gather: ranks bring {counts} rows; give every process the same micro-batch")
