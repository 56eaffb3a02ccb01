"""Full precision: what losses and region pooling compute in, whatever autocast says."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision_type(tensor: Tensor) -> torch.dtype:
    """What a loss of this tensor computes in: float32, or float64 where the tensor is that."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64; the gradient goes back in the tensor's own type."""
    return tensor.to(full_precision_type(tensor))


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which autocast is off for the tensor's device: float32 stays float32 in products too."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


WITHOUT_FLOAT64 = ("mps",)
"""Devices that know no double precision."""


def double_precision(tensor: Tensor) -> Tensor:
    """The tensor in float64, or in float32 on a device that has no other; the gradient goes back in the tensor's own type."""
    return tensor.to(torch.float32 if tensor.device.type in WITHOUT_FLOAT64 else torch.float64)
