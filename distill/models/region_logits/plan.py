"""The regions that are computed once for all criteria: one constant matrix, and each criterion's rows in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.protocols import Needs, Regions
from distill.regions import region_matrix


@dataclass(frozen=True)
class RegionPlan:
    """All regions that one backbone pools, each distinct row once."""

    matrix: Tensor
    """float32 [U, H * W], the distinct rows."""
    origins: tuple[tuple[Regions, int], ...]
    """The origin of each row of `matrix`: the first `Regions` that asked for it, and its number there."""
    features: dict[Regions, tuple[int, ...]]
    """The rows of `matrix`, in order, for each `Regions` whose features are asked for."""
    through_head: tuple[int, ...]
    """The rows of `matrix` that the model's head has to see."""
    logits: dict[Regions, tuple[int, ...]]
    """Positions in [whole image, *through_head], in order, for each `Regions` whose logits are asked for."""


def plan_regions(needs: Needs, grid: tuple[int, int]) -> RegionPlan:
    """The plan for what `needs` asks of a map with this grid; rows that coincide are kept once.

    A region that is the whole image takes the model's own logits, except in `cascade` mode, where the 1x1 region is the
    cascade's own average and goes through the head like any other.
    """
    rows: dict[bytes, int] = {}
    kept: list[Tensor] = []
    origins: list[tuple[Regions, int]] = []

    def number(row: Tensor, regions: Regions, place: int) -> int:
        # 2^-20 is far below the smallest weight of a region and far above float32 rounding of equal rows
        key = (row.double() * 2**20).round().long().numpy().tobytes()
        if key not in rows:
            rows[key] = len(kept)
            kept.append(row)
            origins.append((regions, place))
        return rows[key]

    features = {
        regions: tuple(number(row, regions, i) for i, row in enumerate(region_matrix(*grid, regions)))
        for regions in needs.region_features
    }
    through_head: list[int] = []
    logits: dict[Regions, tuple[int, ...]] = {}
    for regions in needs.region_logits:
        positions = []
        for i, row in enumerate(region_matrix(*grid, regions)):
            if regions.mode != "cascade" and is_whole(row):
                positions.append(0)
                continue
            index = number(row, regions, i)
            if index not in through_head:
                through_head.append(index)
            positions.append(1 + through_head.index(index))
        logits[regions] = tuple(positions)
    matrix = torch.stack(kept).float() if kept else torch.zeros(0, grid[0] * grid[1])
    return RegionPlan(matrix, tuple(origins), features, tuple(through_head), logits)


def rows_on(origins: Sequence[tuple[Regions, int]], grid: tuple[int, int]) -> Tensor:
    """The same regions on another grid: float32 [len(origins), height * width]."""
    return torch.stack([region_matrix(*grid, regions)[number] for regions, number in origins]).float()


def is_whole(row: Tensor) -> bool:
    """Whether this row of weights is the plain mean over the grid."""
    return bool((row - 1 / row.numel()).abs().max() < 1e-6 / row.numel())


def take(rows: Tensor, positions: Sequence[int], index: Tensor) -> Tensor:
    """rows [B, U, C] at `positions`; `index` is the same on the device. No copy where these are all rows in order."""
    if list(positions) == list(range(rows.shape[1])):
        return rows
    return rows.index_select(1, index)
