"""VGG with BatchNorm for CIFAR: five groups of 3x3 convolutions, a mean over the grid and one linear layer.

The first group is the stem. Groups two to four start with a max pooling, the fifth keeps the grid. At 224 px the first
convolution is 7x7 with stride 2 and the second group does not pool, which leaves 28x28 cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from distill.models.cifar.staged import StagedNet, conv_norm, register

WIDTHS = (64, 128, 256, 512, 512)


def vgg(depths: Sequence[int], *, large_stem: bool = False, in_chans: int = 3, **head: Any) -> StagedNet:
    """A VGG of five groups with `depths` convolutions each."""
    groups: list[nn.Module] = []
    before = in_chans
    for group, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
        pools = group in (1, 2, 3) and not (large_stem and group == 1)
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if pools else []
        for number in range(depth):
            first = large_stem and group == 0 and number == 0
            layers += conv_norm(before, width, 7 if first else 3, 2 if first else 1, bias=True)
            layers.append(nn.ReLU(inplace=True))
            before = width
        groups.append(nn.Sequential(*layers))
    reductions = (1, 2, 4, 4) if large_stem else (2, 4, 8, 8)  # of the stages; `StagedNet` doubles those after a large stem
    return StagedNet(
        groups[0],
        groups[1:],
        None,
        widths=WIDTHS[1:],
        reductions=reductions,
        head_width=WIDTHS[-1],
        large_stem=large_stem,
        in_chans=in_chans,
        **head,
    )


DEPTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}

for _layers, _depths in DEPTHS.items():
    register(__name__, f"cifar_vgg{_layers}", partial(vgg, _depths), stages=4)
