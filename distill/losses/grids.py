"""Maps of different grids brought to one."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.precision import full_precision, no_autocast
from distill.regions import Grid


def grid_of(feature_map: Tensor) -> Grid:
    """Height and width of a [B, C, H, W] map."""
    return feature_map.shape[-2], feature_map.shape[-1]


def smaller_grid(first: Tensor, second: Tensor) -> Grid:
    """The smaller height and the smaller width of two maps."""
    return min(first.shape[-2], second.shape[-2]), min(first.shape[-1], second.shape[-1])


def averaged_to(feature_map: Tensor, grid: Grid) -> Tensor:
    """The map averaged adaptively to this grid, in its own type; the map itself where it has that grid.

    Averages are taken in float32 (float64 stays); a grid larger than the map's repeats cells. Two products do it, because the
    backward pass of PyTorch's adaptive pooling is not deterministic on a GPU.
    """
    if grid_of(feature_map) == grid:
        return feature_map
    with no_autocast(feature_map):
        wide = full_precision(feature_map)
        rows, columns = (
            _averages(length, cells, wide.dtype, wide.device)
            for length, cells in zip(feature_map.shape[-2:], grid, strict=True)
        )
        return (rows @ wide @ columns.T).to(feature_map.dtype)


@lru_cache(maxsize=256)
def _averages(length: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One axis of adaptive average pooling, [cells, length]; made once, for copying it there would make the host wait."""
    # an ordinary tensor even when the first call comes under inference_mode: those made there cannot be used in training
    with torch.inference_mode(False):
        return F.adaptive_avg_pool1d(torch.eye(length, dtype=torch.float64, device="cpu"), cells).T.to(device, dtype)
