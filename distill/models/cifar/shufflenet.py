"""ShuffleNet V1 (Zhang et al. 2018, three groups) and V2 (Ma et al. 2018, width 1) for CIFAR: a stem that keeps the grid."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.cifar.staged import StagedNet, conv_norm, register, stem_convolution


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels dealt out over `groups`: [B, g * n, H, W] -> the same, read n by g."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedBottleneck(nn.Module):
    """V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1. With stride 2 the averaged input is concatenated, else added."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        added = channels - in_channels if stride == 2 else channels
        inner = added // 4
        # the stem's 24 channels are too few to be grouped
        self.groups = 1 if in_channels == 24 else groups
        self.reduce = nn.Sequential(*conv_norm(in_channels, inner, 1, groups=self.groups), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(*conv_norm(inner, inner, 3, stride, groups=inner), nn.ReLU(inplace=True))
        self.expand = nn.Sequential(*conv_norm(inner, added, 1, groups=groups))
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(shuffled(self.reduce(x), self.groups)))
        return self.act(y + x if self.shortcut is None else torch.cat([y, self.shortcut(x)], dim=1))


class SplitUnit(nn.Module):
    """V2: half of the channels pass, the other half runs through 1x1, depthwise 3x3, 1x1; then a shuffle of both halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch(channels // 2, channels // 2, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        # The paper's ReLU ends the branch. Behind the shuffle it gives the same numbers, for `kept` is nowhere negative, and
        # the unit ends in an activation, so that its pre-activation can be had.
        return self.act(shuffled(torch.cat([kept, self.branch(changed)], dim=1), 2))


class DownUnit(nn.Module):
    """V2: both branches see the whole input and halve its grid."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.left = nn.Sequential(
            *conv_norm(in_channels, in_channels, 3, 2, groups=in_channels), *conv_norm(in_channels, half, 1)
        )
        self.right = _branch(in_channels, half, 2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(shuffled(torch.cat([self.left(x), self.right(x)], dim=1), 2))


def _branch(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """1x1, depthwise 3x3 and 1x1 convolutions, without the activation that ends them."""
    return nn.Sequential(
        *conv_norm(in_channels, channels, 1),
        nn.ReLU(inplace=True),
        *conv_norm(channels, channels, 3, stride, groups=channels),
        *conv_norm(channels, channels, 1),
    )


def shufflenet_v1(groups: int, *, large_stem: bool = False, in_chans: int = 3, **head: Any) -> StagedNet:
    """ShuffleNet V1 with stages of 4, 8 and 4 blocks."""
    widths, stages, before = (240, 480, 960), [], 24
    for width, depth in zip(widths, (4, 8, 4), strict=True):
        first = GroupedBottleneck(before, width, 2, groups)
        stages.append(nn.Sequential(first, *(GroupedBottleneck(width, width, 1, groups) for _ in range(depth - 1))))
        before = width
    return StagedNet(
        _stem(in_chans, large_stem), stages, None, widths=widths, head_width=960, **_common(large_stem, in_chans), **head
    )


def shufflenet_v2(*, large_stem: bool = False, in_chans: int = 3, **head: Any) -> StagedNet:
    """ShuffleNet V2 at width 1; the head reads 1024 channels behind a 1x1 convolution."""
    widths, stages, before = (116, 232, 464), [], 24
    for width, depth in zip(widths, (3, 7, 3), strict=True):
        stages.append(nn.Sequential(DownUnit(before, width), *(SplitUnit(width) for _ in range(depth))))
        before = width
    tail = nn.Sequential(*conv_norm(before, 1024, 1), nn.ReLU(inplace=True))
    return StagedNet(
        _stem(in_chans, large_stem), stages, tail, widths=widths, head_width=1024, **_common(large_stem, in_chans), **head
    )


def _common(large_stem: bool, in_chans: int) -> dict[str, Any]:
    return {"reductions": (2, 4, 8), "large_stem": large_stem, "in_chans": in_chans}


def _stem(in_chans: int, large: bool) -> nn.Sequential:
    return nn.Sequential(stem_convolution(in_chans, 24, large, kernel=1), nn.BatchNorm2d(24), nn.ReLU(inplace=True))


register(__name__, "cifar_shufflenetv1", partial(shufflenet_v1, 3), stages=3)
register(__name__, "cifar_shufflenetv2", shufflenet_v2, stages=3)
