"""ResNets for CIFAR with projection shortcuts, at the papers' depths and widths.

The thin ones (He et al. 2016, section 4.2): depth 6n + 2 in three stages of n basic blocks; `x4` variants are four times as
wide after a stem of 32 channels. ResNet-18/34/50: the ImageNet nets with a 3x3 stem and no max pooling. The maps are taken
after the last ReLU of a stage. Parameter counts equal those of mdistiller's models of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from distill.models.cifar.staged import StagedNet, conv_norm, drop_path_rates, register, stem_convolution


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, which is a 1x1 convolution and BatchNorm where the shape changes."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_channels, channels, 3, stride)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(in_channels, channels, 1, stride))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(self.drop_path(y) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; four times as many channels come out as `channels`."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float) -> None:
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1, self.bn1 = conv_norm(in_channels, channels, 1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3, stride)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = conv_norm(channels, out_channels, 1)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(in_channels, out_channels, 1, stride))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.act3(self.drop_path(self.bn3(self.conv3(y))) + self.shortcut(x))


def resnet(
    block: type[BasicBlock] | type[Bottleneck],
    depths: Sequence[int],
    stem_width: int,
    widths: Sequence[int],
    *,
    large_stem: bool = False,
    in_chans: int = 3,
    drop_path_rate: float = 0.0,
    **head: Any,
) -> StagedNet:
    """A ResNet of stages of `depths` blocks at `widths`; every stage but the first halves the grid."""
    stages, before = [], stem_width
    for stage, rates in enumerate(drop_path_rates(drop_path_rate, depths)):
        blocks = []
        for number, rate in enumerate(rates):
            stride = 2 if stage and not number else 1
            blocks.append(block(before, widths[stage], stride, rate))
            before = block.expansion * widths[stage]
        stages.append(nn.Sequential(*blocks))
    first = stem_convolution(in_chans, stem_width, large_stem)
    return StagedNet(
        nn.Sequential(first, nn.BatchNorm2d(stem_width), nn.ReLU(inplace=True)),
        stages,
        None,
        widths=[block.expansion * width for width in widths],
        reductions=[2**stage for stage in range(len(depths))],
        head_width=before,
        large_stem=large_stem,
        in_chans=in_chans,
        **head,
    )


def thin(depth: int, multiple: int = 1) -> partial[StagedNet]:
    """The CIFAR ResNet of 6n + 2 layers; ValueError for another depth."""
    if (depth - 2) % 6:
        raise ValueError(f"depth {depth}: a CIFAR ResNet has 6n + 2 layers; use 8, 14, 20, 32, 44, 56 or 110")
    depths = [(depth - 2) // 6] * 3
    return partial(resnet, BasicBlock, depths, 16 if multiple == 1 else 32, [w * multiple for w in (16, 32, 64)])


IMAGENET_WIDTHS = (64, 128, 256, 512)
NETS: dict[str, partial[StagedNet]] = {
    **{f"cifar_resnet{depth}": thin(depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"cifar_resnet{depth}x4": thin(depth, 4) for depth in (8, 32)},
    "cifar_resnet18": partial(resnet, BasicBlock, (2, 2, 2, 2), 64, IMAGENET_WIDTHS),
    "cifar_resnet34": partial(resnet, BasicBlock, (3, 4, 6, 3), 64, IMAGENET_WIDTHS),
    "cifar_resnet50": partial(resnet, Bottleneck, (3, 4, 6, 3), 64, IMAGENET_WIDTHS),
}

for _name, _make in NETS.items():
    register(__name__, _name, _make, stages=len(_make.args[1]))
