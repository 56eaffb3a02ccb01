"""Wide ResNets (Zagoruyko and Komodakis 2016) for CIFAR: 6n + 4 layers, pre-activation blocks.

A stage's map is what its last block adds up, before any BatchNorm; the last BatchNorm and ReLU run before the head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from distill.models.cifar.staged import StagedNet, drop_path_rates, register, stem_convolution


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; where widths change the shortcut starts after the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()  # not in place: the shortcut of equal widths reads its input
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        changes = in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        y = self.conv2(self.act2(self.bn2(self.conv1(active))))
        return self.drop_path(y) + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(
    depth: int, multiple: int, *, large_stem: bool = False, in_chans: int = 3, drop_path_rate: float = 0.0, **head: Any
) -> StagedNet:
    """WRN-depth-multiple; ValueError where depth is not 6n + 4."""
    if (depth - 4) % 6:
        raise ValueError(f"depth {depth}: a wide ResNet has 6n + 4 layers; use 16 or 40")
    widths = [16 * multiple, 32 * multiple, 64 * multiple]
    stages, before = [], 16
    for stage, rates in enumerate(drop_path_rates(drop_path_rate, [(depth - 4) // 6] * 3)):
        blocks = []
        for number, rate in enumerate(rates):
            blocks.append(PreActivationBlock(before, widths[stage], 2 if stage and not number else 1, rate))
            before = widths[stage]
        stages.append(nn.Sequential(*blocks))
    return StagedNet(
        nn.Sequential(stem_convolution(in_chans, 16, large_stem)),
        stages,
        nn.Sequential(nn.BatchNorm2d(before), nn.ReLU()),  # not in place: the stage's map stays what it was
        widths=widths,
        reductions=(1, 2, 4),
        head_width=before,
        large_stem=large_stem,
        in_chans=in_chans,
        **head,
    )


for _depth, _multiple in ((16, 1), (16, 2), (40, 1), (40, 2)):
    register(__name__, f"cifar_wrn_{_depth}_{_multiple}", partial(wide_resnet, _depth, _multiple), stages=3)
