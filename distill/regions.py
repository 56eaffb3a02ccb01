"""Regions of a feature map: pooling matrices, and the order of regions.

A region is one row of a constant matrix over the map's cells, so that pooling is one product: its backward is deterministic
on a GPU (adaptive pooling's is not), and one code path serves pyramids and sliding windows at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.precision import full_precision, no_autocast
from distill.protocols import Regions

Mode = Literal["area", "adaptive", "cascade"]
Grid = tuple[int, int]

MODES = get_args(Mode)
Rule = Literal["label", "class"]
RULES = get_args(Rule)
Classes = TypeVar("Classes", Tensor, NDArray[Any])
CASCADE_GRID = 4


def pooling_matrix(height: int, width: int, scales: Sequence[int], mode: str = "area") -> Tensor:
    """The average over each cell of each scale, as rows over the map's cells: float64 [R, height * width].

    Scale m is an m x m grid of cells, row-major; the scales follow in the given order, so R = sum of m^2. Rows sum to 1.
    The map may be of any size, square or not, smaller than a scale too (cells then repeat values of the map).

    - `area`: cell i of m covers [i/m, (i+1)/m) of the side and weighs each pixel by its overlap. Cells partition the image,
      so a teacher's and a student's region are the same part of it whatever their maps' sizes.
    - `adaptive`: `adaptive_avg_pool2d` of the full map; windows overlap where m does not divide the side.
    - `cascade`: SDD's released code (shicaiwei123/SDD-CVPR2024 at e412036, `SPP`): every scale, 1 too, is pooled from the
      4 x 4 adaptive grid. On a 7 x 7 map its "whole image" weighs rows .125 .208 .083 .167 .083 .208 .125, not 1/7 each.

    The three agree wherever 4 divides both sides. Raises ValueError for an unknown mode, a scale that is not a positive
    integer or is listed twice, a scale above 4 in `cascade`, and an empty map.
    """
    _check_grid(height, width)
    _check_sizes("scales", scales)
    if mode not in MODES:
        raise ValueError(f"pooling mode {mode!r} is unknown; choose one of {', '.join(MODES)}")
    if mode == "cascade" and max(scales) > CASCADE_GRID:
        raise ValueError(
            f"scale {max(scales)} has no cells of its own in a cascade from 4 x 4; use scales up to 4, or mode='area'"
        )
    return torch.cat([torch.kron(_side(height, scale, mode), _side(width, scale, mode)) for scale in scales])


def window_matrix(height: int, width: int, windows: Sequence[int], stride: int = 1, grid: Grid | None = None) -> Tensor:
    """The average over each sliding k x k window, as rows over the map's cells: float64 [R, height * width].

    The windows slide over `grid` (rows, columns; the map's own when None) by `stride`, row-major, k by k in the given
    order. When `grid` is another map's, the same relative windows are laid over this map by fractional overlap. Rows sum
    to 1. Raises ValueError for a window larger than its grid, and for windows or strides that are not positive integers.
    """
    _check_grid(height, width)
    rows, columns = grid or (height, width)
    _check_grid(rows, columns)
    _check_sizes("windows", windows)
    if stride < 1:
        raise ValueError(f"stride {stride} must be at least 1")
    if max(windows) > min(rows, columns):
        raise ValueError(
            f"window {max(windows)} is larger than the {rows} x {columns} map; use windows up to {min(rows, columns)}"
        )
    return torch.cat(
        [torch.kron(_sliding(height, rows, size, stride), _sliding(width, columns, size, stride)) for size in windows]
    )


def _check_grid(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"a {height} x {width} map has no cells; both sides must be at least 1")


def _check_sizes(name: str, sizes: Sequence[int]) -> None:
    """Raises ValueError unless the sizes are positive integers, at least one, none twice."""
    if not sizes:
        raise ValueError(f"{name} is empty; give at least one")
    if any(isinstance(size, bool) or not isinstance(size, Integral) or size < 1 for size in sizes):
        raise ValueError(f"{name} {list(sizes)} must be positive integers")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"{name} {list(sizes)} name one twice; list each once")


def _side(length: int, cells: int, mode: str) -> Tensor:
    """One axis of a scale: [cells, length], rows sum to 1."""
    if mode == "cascade":
        return adaptive_side(CASCADE_GRID, cells) @ adaptive_side(length, CASCADE_GRID)
    if mode == "adaptive":
        return adaptive_side(length, cells)
    return _overlap(length, [(cell / cells, (cell + 1) / cells) for cell in range(cells)])


def adaptive_side(length: int, cells: int) -> Tensor:
    """PyTorch's adaptive windows: cell i averages pixels floor(i L / m) to ceil((i + 1) L / m) - 1."""
    matrix = torch.zeros(cells, length, dtype=torch.float64)
    for cell in range(cells):
        start, stop = cell * length // cells, -(-(cell + 1) * length // cells)
        matrix[cell, start:stop] = 1 / (stop - start)
    return matrix


def _sliding(length: int, grid: int, size: int, stride: int) -> Tensor:
    """One axis of the windows of `grid` cells, over a side of `length` pixels: [(grid - size) // stride + 1, length]."""
    return _overlap(length, [(start / grid, (start + size) / grid) for start in range(0, grid - size + 1, stride)])


def _overlap(length: int, intervals: list[tuple[float, float]]) -> Tensor:
    """Rows of relative overlap of each interval of [0, 1] with each of `length` equal pixels; each row sums to 1."""
    start, stop = torch.tensor(intervals, dtype=torch.float64).mul_(length).unbind(1)
    pixel = torch.arange(length, dtype=torch.float64)
    overlap = torch.minimum(stop[:, None], pixel + 1) - torch.maximum(start[:, None], pixel)
    overlap = overlap.clamp_min(0)
    # i / m * L is a whole number up to rounding where a border falls on a pixel's; what rounding leaves there is not a share.
    overlap[overlap < 1e-9] = 0
    return overlap / overlap.sum(1, keepdim=True)


def pool(feature_map: Tensor, matrix: Tensor) -> Tensor:
    """The mean of a [B, C, H, W] map over each region of `matrix` [R, H * W] -> [B, R, C], float32 (float64 stays).

    Reads contiguous and channels_last maps without a copy; computed outside autocast.
    """
    with no_autocast(feature_map):
        cells = full_precision(feature_map).flatten(2).transpose(1, 2)
        return torch.matmul(matrix.to(cells), cells)


def region_matrix(height: int, width: int, regions: Regions, window_grid: Grid | None = None) -> Tensor:
    """The rows of `pooling_matrix`, then those of `window_matrix`: float64 [R, height * width].

    `window_grid` is the grid that the windows slide over; the map's own when None.
    """
    parts = [pooling_matrix(height, width, regions.scales, regions.mode)] if regions.scales else []
    if regions.windows:
        parts.append(window_matrix(height, width, regions.windows, regions.stride, window_grid))
    if not parts:
        raise ValueError("scales and windows are both empty; give at least one")
    return torch.cat(parts)


def cached_matrix(
    grid: Grid,
    scales: tuple[int, ...],
    windows: tuple[int, ...],
    stride: int,
    window_grid: Grid,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`region_matrix` in area mode on the device, made once: copying it there in every step would make the host wait."""
    if torch.compiler.is_compiling():
        return _opaque_matrix(grid, scales, windows, stride, window_grid, dtype, device)
    return _made_matrix(grid, Regions(scales, "area", windows, stride), window_grid, dtype, device)


@lru_cache(maxsize=256)
def _made_matrix(grid: Grid, regions: Regions, window_grid: Grid, dtype: torch.dtype, device: torch.device) -> Tensor:
    # an ordinary tensor even when the first call comes under inference_mode: those made there cannot be used in training
    with torch.inference_mode(False):
        return region_matrix(*grid, regions, window_grid).to(device=device, dtype=dtype)


@torch.library.custom_op(
    "distill::region_matrix",
    mutates_args=(),
    schema="(int[] grid, int[] scales, int[] windows, int stride, int[] window_grid, ScalarType dtype, Device device)"
    " -> Tensor",
)
def _opaque_matrix(
    grid: Sequence[int],
    scales: Sequence[int],
    windows: Sequence[int],
    stride: int,
    window_grid: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What a compiler calls instead of tracing how a constant is made; a copy, for it may use the memory for something else."""
    regions = Regions(tuple(scales), "area", tuple(windows), stride)
    return _made_matrix((grid[0], grid[1]), regions, (window_grid[0], window_grid[1]), dtype, device).clone()


@_opaque_matrix.register_fake
def _(
    grid: Sequence[int],
    scales: Sequence[int],
    windows: Sequence[int],
    stride: int,
    window_grid: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    rows = sum(scale * scale for scale in scales)
    for size in windows:
        rows += math.prod((side - size) // stride + 1 for side in window_grid)
    return torch.empty(rows, grid[0] * grid[1], dtype=dtype, device=device)


def scale_slices(scales: Sequence[int]) -> dict[int, slice]:
    """The place of each scale's regions along the region axis."""
    ends = [0]
    for scale in scales:
        ends.append(ends[-1] + scale * scale)
    return {scale: slice(start, stop) for scale, start, stop in zip(scales, ends[:-1], ends[1:], strict=True)}


def usable_scales(scales: Sequence[int], *grids: Grid) -> tuple[int, ...]:
    """The scales that every one of the maps can fill: a larger one would only repeat cells of the smaller map."""
    smallest = min(min(grid) for grid in grids)
    return tuple(scale for scale in scales if scale <= smallest)


def disagreeing(region_classes: Classes, labels: Classes, rule: str) -> Classes:
    """A mask of the regions whose class disagrees with that of the whole image: classes [B, R], labels [B] -> bool [B, R].

    The whole image comes first and is never one of them. `label` (SDD's released code): right where the whole image is wrong,
    or the other way round. `class` (the text of arXiv 2403.13512): another class than that of the whole image; labels are not
    read. They agree wherever the whole image is right; they differ where both are wrong, but differently.
    """
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; choose one of {', '.join(RULES)}")
    told = region_classes if rule == "class" else region_classes == labels[:, None]
    return told != told[:, :1]
