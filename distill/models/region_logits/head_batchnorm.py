"""The BatchNorm of a head that runs a second time, on regions: it normalises by other statistics, and keeps none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = tuple[Tensor, Tensor]
"""Mean and variance of a BatchNorm, each [C]."""

FEW_ROWS = 16
"""A variance of n values is off by sqrt(2 / (n - 1)), 37 % at 16. Regions vary more than whole images do, so dividing them by
the spread of a handful of images blows their logits up."""


def training_batchnorms(norms: Sequence[nn.Module]) -> list[_BatchNorm]:
    """The BatchNorms that now normalise by the batch and change their running statistics. Frozen ones do neither."""
    return [n for n in norms if isinstance(n, _BatchNorm) and n.training and n.running_mean is not None]


def snapshot(norms: Sequence[_BatchNorm]) -> list[Statistics]:
    """Copies of the running statistics."""
    return [(_tensor(n.running_mean).clone(), _tensor(n.running_var).clone()) for n in norms]


def region_statistics(norms: Sequence[_BatchNorm], before: Sequence[Statistics], rows: int) -> list[Statistics]:
    """The statistics that regions are normalised by: those of the batch that moved the running ones since `before`.

    They are old + (new - old) / momentum, detached. rows: values per channel that the batch had on this process. Running
    variances are unbiased, n / (n - 1); normalising uses the biased one, so that factor is divided out. Below `FEW_ROWS`,
    and for a BatchNorm whose momentum says nothing (None, 0), the running statistics themselves.
    """
    found = []
    for norm, (mean, variance) in zip(norms, before, strict=True):
        count = rows * _world(norm)
        new_mean, new_variance = _tensor(norm.running_mean).clone(), _tensor(norm.running_var).clone()
        if count >= FEW_ROWS and norm.momentum:
            unbiased = variance + (new_variance - variance) / norm.momentum
            new_mean = mean + (new_mean - mean) / norm.momentum
            new_variance = (unbiased * ((count - 1) / count)).clamp_min(0)
        found.append((new_mean, new_variance))
    return found


@contextmanager
def normalised_by(norms: Sequence[_BatchNorm], statistics: Sequence[Statistics]) -> Iterator[None]:
    """A block in which these BatchNorms use the given statistics and keep no new ones.

    A second update of the running statistics, by the larger variance of regions, would falsify evaluation in silence. The
    buffers are swapped, not overwritten: autograd may hold the running ones for the backward of another call.
    """
    own = [(norm.running_mean, norm.running_var) for norm in norms]
    for norm, (mean, variance) in zip(norms, statistics, strict=True):
        norm.running_mean, norm.running_var, norm.training = mean, variance, False
    try:
        yield
    finally:
        for norm, (own_mean, own_variance) in zip(norms, own, strict=True):
            norm.running_mean, norm.running_var, norm.training = own_mean, own_variance, True


def _world(norm: nn.Module) -> int:
    """Processes whose batches this BatchNorm pools."""
    synced = isinstance(norm, nn.SyncBatchNorm) and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if synced else 1


def _tensor(buffer: Tensor | None) -> Tensor:
    if buffer is None:
        raise ValueError("a BatchNorm without running statistics has none to keep; track_running_stats=True is needed here")
    return buffer
