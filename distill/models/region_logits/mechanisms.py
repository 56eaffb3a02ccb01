"""The ways to the logits of a region: each sends regions through the model's own head, and each is checked on the model.

`pool`   the head on the region's mean. Exact wherever the head starts with a mean over the grid.
`split`  the head starts with layers before its mean (1x1 convolution, BatchNorm, activation): those run once, on the image,
         and the region's mean is taken where the head takes its own.
`crop`   the head is no mean (attention pool, 7x7 convolution, class token and patches): it runs on the region's cells.
`token`  the head reads class tokens and never the grid. Region logits are then a definition, see `ClassTokenHead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from distill.models.region_logits.layout import Features, Layout, TimmModel, join_tokens
from distill.models.taps import Tap, tapped
from distill.protocols import ClassTokens
from distill.regions import pool

CLASS_TOKEN_MODES = get_args(ClassTokens)


class Sight(NamedTuple):
    """What a mechanism sees of one forward pass."""

    features: Features
    """What the head reads."""
    rows: Tensor
    """float32 [B, R, C], the feature map's mean over each region that goes through the head."""
    feature_map: Tensor
    """[B, C, H, W]."""
    logits: Tensor
    """[B, K], the model's own."""
    inner: Tensor | None = None
    """Input of the last block, tokens [B, L, C]; for `attend` only."""


def as_head_input(rows: Tensor, like: Tensor) -> Tensor:
    """float32 rows in the dtype that the head runs in: autocast casts by itself, else that of the features."""
    return rows if torch.is_autocast_enabled(rows.device.type) else rows.to(like.dtype)


class PoolHead(nn.Module):
    """`pool`. Parts of the features without a grid go to the head as they are; other grids are pooled over the same regions."""

    kind = "pool"

    def __init__(self, layout: Layout, matrices: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.layout = layout
        for i, matrix in enumerate(matrices):
            self.register_buffer(f"matrix_{i}", matrix, persistent=False)

    def part_rows(self, sight: Sight) -> list[Tensor | None]:
        """Regions [B, R, C] of each part of the features; None for a part without a grid."""
        rows: list[Tensor | None] = []
        for i, (part, tensor) in enumerate(zip(self.layout.parts, self.layout.tensors(sight.features), strict=True)):
            matrix = getattr(self, f"matrix_{i}")
            if i == self.layout.primary:
                rows.append(as_head_input(sight.rows, tensor))
            else:
                rows.append(None if matrix is None else as_head_input(pool(part.to_map(tensor), matrix), tensor))
        return rows

    def forward(self, model: TimmModel, sight: Sight) -> Tensor:
        """-> logits of each region, [B, R, K]."""
        count = sight.rows.shape[1]
        cells = [
            tensor.repeat_interleave(count, dim=0) if rows is None else part.from_rows(rows, tensor)
            for part, tensor, rows in zip(
                self.layout.parts, self.layout.tensors(sight.features), self.part_rows(sight), strict=True
            )
        ]
        return model.forward_head(self.layout.features(cells)).unflatten(0, sight.rows.shape[:2])


class SplitHead(nn.Module):
    """`split`. `pool_name` is the head's own pool module; it reads a map of the features' grid."""

    kind = "split"

    def __init__(self, matrix: Tensor, pool_name: str, output_dims: int) -> None:
        super().__init__()
        self.trailing = (1,) * (output_dims - 2)
        self.tap = Tap(pool_name, copies=False)  # a pool does not write into what it reads
        self.register_buffer("matrix", matrix, persistent=False)

    def first(self, model: TimmModel, features: Features) -> tuple[Tensor, Tensor]:
        """The model's own logits, and the map that its pool read."""
        with tapped(model, [self.tap]):
            logits = model.forward_head(features)
        return logits, self.tap.taken()

    def forward(self, model: TimmModel, sight: Sight) -> Tensor:
        """-> logits of each region, [B, R, K]; `sight.inner` is the map that the pool read."""
        kept = sight.inner
        rows = as_head_input(pool(kept, self.matrix), kept)  # type: ignore[arg-type]
        self.tap.given = rows.flatten(0, 1).unflatten(1, (-1, *self.trailing))
        try:
            # one sample runs through the layers before the pool, and what it gives there is dropped
            with tapped(model, [self.tap]):
                return model.forward_head(sight.features[:1]).unflatten(0, rows.shape[:2])
        finally:
            self.tap.given = None


class CropHead(nn.Module):
    """`crop`. A region is the smallest box of whole cells that covers it; boxes of one shape share a head call."""

    kind = "crop"

    def __init__(self, layout: Layout, matrix: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.shapes: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for number, row in enumerate(matrix):
            covered = (row.reshape(layout.height, layout.width) > 0).nonzero()
            (top, left), (bottom, right) = covered.amin(0).tolist(), covered.amax(0).tolist()
            self.shapes.setdefault((bottom + 1 - top, right + 1 - left), []).append((number, top, left))
        order = [number for boxes in self.shapes.values() for number, _, _ in boxes]
        self.register_buffer("places", torch.tensor(order).argsort(), persistent=False)

    def forward(self, model: TimmModel, sight: Sight) -> Tensor:
        """-> logits of each region, [B, R, K]."""
        [part] = self.layout.parts
        grid = part.to_map(sight.features)
        found = []
        for (height, width), boxes in self.shapes.items():
            crops = [grid[:, :, top : top + height, left : left + width] for _, top, left in boxes]
            stacked = torch.stack(crops, dim=1).flatten(0, 1)
            like = sight.features.repeat_interleave(len(boxes), dim=0) if part.prefix else sight.features
            logits = model.forward_head(part.from_map(stacked, like))
            found.append(logits.unflatten(0, (len(grid), len(boxes))))
        return torch.cat(found, dim=1).index_select(1, self.places)  # type: ignore[arg-type]


class ClassTokenHead(PoolHead):
    """`token` without attention. No paper defines regions of a class-token model; with t the class tokens after the last norm:

    `shift`: t + (region mean - image mean) of the final patch tokens; equal to the model's logits for the whole image.
    `repeat`: the model's own logits for every region.
    """

    def __init__(self, layout: Layout, matrices: Sequence[Tensor | None], mode: str) -> None:
        super().__init__(layout, matrices)
        self.mode = mode
        self.kind = f"token:{mode}"

    def forward(self, model: TimmModel, sight: Sight) -> Tensor:
        """-> logits of each region, [B, R, K]."""
        if self.mode == "repeat":
            return sight.logits[:, None].expand(-1, sight.rows.shape[1], -1)
        tensors = self.layout.tensors(sight.features)
        cells = []
        for i, (part, tensor, rows) in enumerate(zip(self.layout.parts, tensors, self.part_rows(sight), strict=True)):
            if part.form == "none":
                cells.append(tensor.repeat_interleave(sight.rows.shape[1], dim=0))
                continue
            apart = self.layout.primary is None
            local = as_head_input(sight.rows, tensor) if rows is None else rows
            grid = sight.feature_map if apart or i == self.layout.primary else part.to_map(tensor)
            cells.append(self._tokens(tensor[:, : part.prefix], local, grid))
        return model.forward_head(self.layout.features(cells)).unflatten(0, sight.rows.shape[:2])

    def _tokens(self, prefix: Tensor, rows: Tensor, grid: Tensor) -> Tensor:
        """Class tokens [B, P, C], regions [B, R, C] and their map -> tokens [B * R, P + 1, C] for the head."""
        moved = rows - as_head_input(grid.float().mean((2, 3)), prefix)[:, None]
        placed = prefix.repeat_interleave(rows.shape[1], dim=0) + moved.flatten(0, 1)[:, None]
        return join_tokens(placed, rows.flatten(0, 1)[:, None])
