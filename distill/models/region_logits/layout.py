"""The place of a model's grid: from the features that its head reads to a [B, C, H, W] map, and from rows back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

Features = Any
"""What `forward_features` gives and `forward_head` takes: a tensor, or a list of them for nets of several branches."""

if TYPE_CHECKING:

    class TimmModel(nn.Module):
        """What is used of a timm model beside `nn.Module`; timm has no type for it, so this one is for mypy alone."""

        num_classes: int
        blocks: Any
        """Only `VisionTransformer` and its kin have them, and `norm`."""
        norm: Any

        def forward_features(self, x: Tensor) -> Features:
            """Normalised images [B, 3, H, W] -> what the head reads."""

        def forward_head(self, x: Features) -> Tensor:
            """What the head reads -> logits [B, K]."""

        def forward_intermediates(self, x: Tensor, **options: Any) -> Any:
            """Normalised images -> what the head reads, and the maps that `indices` names."""

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            """Switches activation checkpointing."""

else:
    TimmModel = nn.Module


@dataclass(frozen=True)
class Part:
    """One tensor of the features. Forms: `NCHW`, `NHWC`, `NCL`, `NLC` (tokens behind `prefix` tokens without a place), `none`.

    Grids are row-major. `none` is a tensor without a grid (hidden states); an `NLC` part of height 0 has prefix tokens only.
    """

    form: str
    channels: int
    height: int = 0
    width: int = 0
    prefix: int = 0

    def to_map(self, part: Tensor) -> Tensor:
        """A tensor of this form -> [B, C, H, W]; a view wherever memory allows it."""
        if self.form == "NCHW":
            return part
        if self.form == "NHWC":
            return part.permute(0, 3, 1, 2)
        channels_first = part if self.form == "NCL" else part[:, self.prefix :].transpose(1, 2)
        return channels_first.unflatten(2, (self.height, self.width))

    def from_map(self, grid: Tensor, like: Tensor) -> Tensor:
        """A map [B, C, h, w] of any grid -> a tensor of this form; prefix tokens are those of `like`."""
        if self.form == "NCHW":
            return grid
        if self.form == "NHWC":
            return grid.permute(0, 2, 3, 1)
        if self.form == "NCL":
            return grid.flatten(2)
        tokens = grid.flatten(2).transpose(1, 2)
        return join_tokens(like[:, : self.prefix], tokens) if self.prefix else tokens

    def from_rows(self, rows: Tensor, part: Tensor) -> Tensor:
        """Pooled regions [B, R, C] -> [B * R, ...] of this form with a 1x1 grid; prefix tokens are the region's own image's."""
        like = part[:, : self.prefix].repeat_interleave(rows.shape[1], dim=0) if self.prefix else part
        return self.from_map(rows.flatten(0, 1)[:, :, None, None], like)


@dataclass(frozen=True)
class Layout:
    """The features' parts, and which of them (or which intermediate map) is the map that criteria read."""

    parts: tuple[Part, ...]
    several: bool
    """Whether the features are a list of tensors."""
    primary: int | None
    """The part that is the feature map; None where no part has a grid and an intermediate map stands in."""
    channels: int
    height: int
    width: int
    stand_in: int | None = None
    """Index for `forward_intermediates` of the map that stands in."""

    def tensors(self, features: Features) -> list[Tensor]:
        """The parts of the features, always as a list."""
        return list(features) if self.several else [features]

    def map_of(self, features: Features) -> Tensor:
        """The feature map [B, C, H, W], where one of the parts is it."""
        if self.primary is None:
            raise ValueError("these features hold no grid; an intermediate map stands in")
        return self.parts[self.primary].to_map(self.tensors(features)[self.primary])

    def features(self, tensors: list[Tensor]) -> Features:
        """What `forward_head` takes, from parts."""
        return tensors if self.several else tensors[0]


def join_tokens(prefix: Tensor, tokens: Tensor) -> Tensor:
    """[N, P, C] and [N, L, C] -> [N, P + L, C], in the wider of the two dtypes."""
    dtype = torch.promote_types(prefix.dtype, tokens.dtype)
    return torch.cat([prefix.to(dtype), tokens.to(dtype)], dim=1)


def find_layout(model: TimmModel, features: Features, maps: Sequence[Tensor]) -> Layout:
    """The layout of what `model.forward_features` gave for a batch, given the model's intermediate maps [B, C, H, W].

    A sequence is a grid only where its length, without prefix tokens, is that of one of the maps: so class tokens alone (PiT)
    and hidden states (EfficientViM) are never taken for one. Of several grids the last is the feature map; where there is
    none, the last intermediate map. ValueError for features that are no tensors.
    """
    several = isinstance(features, (list, tuple))
    tensors = list(features) if several else [features]
    if not tensors or not all(isinstance(t, Tensor) and t.ndim in (3, 4) for t in tensors):
        raise ValueError(f"its features ({type(features).__name__}) are neither maps nor tokens")
    parts = tuple(_find_part(model, tensor, [tuple(m.shape[1:]) for m in maps]) for tensor in tensors)
    gridded = [i for i, part in enumerate(parts) if part.height]
    if gridded:
        part = parts[gridded[-1]]
        return Layout(parts, several, gridded[-1], part.channels, part.height, part.width)
    if not maps:
        raise ValueError("neither its features nor its intermediates have a grid")
    last = maps[-1]
    return Layout(parts, several, None, last.shape[1], last.shape[2], last.shape[3], stand_in=len(maps) - 1)


def _find_part(model: TimmModel, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> Part:
    if tensor.ndim == 4:
        return _find_spatial(model, tensor)
    return _find_sequence(model, tensor, shapes)


def _find_spatial(model: TimmModel, tensor: Tensor) -> Part:
    """NCHW or NHWC: what the model says of itself, else the axis that is as long as `num_features`, else NCHW."""
    channels = int(getattr(model, "num_features", 0))
    _, first, second, third = tensor.shape
    told = str(getattr(model, "output_fmt", "")).upper()
    by_length = "NHWC" if third == channels != first else "NCHW"
    form = told if told in ("NCHW", "NHWC") else by_length
    if form == "NHWC":
        return Part("NHWC", channels=third, height=first, width=second)
    return Part("NCHW", channels=first, height=second, width=third)


def _find_sequence(model: TimmModel, tensor: Tensor, shapes: Sequence[tuple[int, ...]]) -> Part:
    """Tokens, or a flattened map, by the shapes (C, H, W) of the intermediate maps; see `find_layout`.

    Tokens: the known number of prefix tokens, else 0, 1 or 2, whichever leaves a known grid or a merge of one by 2 or 3 per
    side. A flattened map has its channels first. A few tokens of the head's own width are class tokens; anything else has no
    grid and goes to the head as it is.
    """
    _, first, second = tensor.shape
    known = getattr(model, "num_prefix_tokens", None)
    grids = [(shape[1], shape[2]) for shape in reversed(shapes)]
    for merge in (1, 2, 3):
        for height, width in ((-(-h // merge), -(-w // merge)) for h, w in grids):
            for prefix in (known,) if isinstance(known, int) else (0, 1, 2):
                if first - prefix == height * width:
                    return Part("NLC", second, height, width, prefix)
    for channels, height, width in reversed(shapes):
        if (first, second) == (channels, height * width):
            return Part("NCL", channels, height, width)
    if first <= 4 and second == getattr(model, "num_features", second):
        return Part("NLC", second, prefix=first)
    return Part("none", second)
