"""MobileNetV2 at half width for CIFAR (Sandler et al. 2018, Table 2, with fewer strides and plain ReLU)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from distill.models.cifar.staged import StagedNet, conv_norm, register, stem_convolution

EXPANSION = 6
# expansion, channels at full width, blocks, stride of the first; grouped by resolution as the papers take their maps
STAGES = (
    ((1, 16, 1, 1), (EXPANSION, 24, 2, 1)),
    ((EXPANSION, 32, 3, 2),),
    ((EXPANSION, 64, 4, 2), (EXPANSION, 96, 3, 1)),
    ((EXPANSION, 160, 3, 2), (EXPANSION, 320, 1, 1)),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; added to the input where shapes allow."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.same = stride == 1 and in_channels == channels
        self.layers = nn.Sequential(
            *conv_norm(in_channels, inner, 1),
            nn.ReLU(inplace=True),
            *conv_norm(inner, inner, 3, stride, groups=inner),
            nn.ReLU(inplace=True),
            *conv_norm(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.same else self.layers(x)


def mobilenetv2(width: float, *, large_stem: bool = False, in_chans: int = 3, **head: Any) -> StagedNet:
    """MobileNetV2 whose stem halves the image; the head reads 1280 channels behind a 1x1 convolution."""
    before = int(32 * width)
    stem = nn.Sequential(
        stem_convolution(in_chans, before, large_stem, stride=2), nn.BatchNorm2d(before), nn.ReLU(inplace=True)
    )
    stages, widths = [], []
    for groups in STAGES:
        blocks = []
        for expansion, channels, count, stride in groups:
            for number in range(count):
                blocks.append(InvertedResidual(before, int(channels * width), 1 if number else stride, expansion))
                before = int(channels * width)
        stages.append(nn.Sequential(*blocks))
        widths.append(before)
    return StagedNet(
        stem,
        stages,
        nn.Sequential(*conv_norm(before, 1280, 1), nn.ReLU(inplace=True)),
        widths=widths,
        reductions=(2, 4, 8, 16),
        head_width=1280,
        large_stem=large_stem,
        in_chans=in_chans,
        **head,
    )


register(__name__, "cifar_mobilenetv2_050", partial(mobilenetv2, 0.5), stages=4)
