"""What the border of an image needs so that DALI resizes it as PIL does.

Where the filter reaches over the border, PIL leaves the outside out and renormalises what is left; DALI repeats the last
pixel. So an image gets a black margin that the filter fits in, is resized without rounding, and is divided by the share of
the filter that lay inside: in the outermost lines of pixels that share is below 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SUPPORT = {"bilinear": 1, "bicubic": 2}
"""Half the width of PIL's filters, in pixels of the coarser of both grids."""


@dataclass(frozen=True)
class Borders:
    """For each of B images, the margin and the shares of the filter inside of the image."""

    margins: NDArray[np.int64]
    """[B, 2] (vertical, horizontal): source pixels on each side."""
    shares: NDArray[np.float32]
    """[B, H, W, 1], for the output that is cut out at the anchors; 1 where the filter lies inside, and outside the image."""


def borders(
    sources: NDArray[np.int64],
    resized: NDArray[np.int64],
    anchors: NDArray[np.int64],
    size: tuple[int, int],
    interpolation: str,
) -> Borders:
    """The borders of images of `sources` [B, 2] pixels that are resized to `resized` [B, 2], then cut at `anchors` [B, 2]
    to `size`; all as (height, width)."""
    margins = np.zeros_like(sources)
    shares = np.ones((len(sources), *size, 1), np.float32)
    for row in range(len(sources)):
        for axis in (0, 1):
            source, target = int(sources[row, axis]), int(resized[row, axis])
            margins[row, axis] = math.ceil(SUPPORT[interpolation] * max(1.0, source / target)) + 1
            line = _visible(inside_shares(source, target, interpolation), int(anchors[row, axis]), size[axis])
            shares[row] *= line.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    return Borders(margins, shares)


def inside_shares(source: int, target: int, interpolation: str) -> NDArray[np.float32]:
    """[target]: the share of the filter's weights that falls on the `source` pixels, for each pixel of the resized line."""
    support = SUPPORT[interpolation]
    scale = source / target
    reach = support * max(1.0, scale)
    lines = min(target, math.ceil(reach / scale))  # the others are farther from the border than the filter reaches
    affected = np.unique(np.concatenate([np.arange(lines), np.arange(target - lines, target)]))
    pixels = np.arange(-math.ceil(reach), source + math.ceil(reach))
    distances = np.abs(pixels + 0.5 - (affected[:, None] + 0.5) * scale) / max(1.0, scale)
    weights = np.maximum(1 - distances, 0) if interpolation == "bilinear" else _cubic(distances)
    shares = np.ones(target, np.float32)
    shares[affected] = weights[:, (pixels >= 0) & (pixels < source)].sum(axis=1) / weights.sum(axis=1)
    return shares


def _cubic(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' filter with a = -0.5, as both libraries have it."""
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    return np.where(distances < 1, near, np.where(distances < 2, far, 0))


def _visible(line: NDArray[np.float32], anchor: int, length: int) -> NDArray[np.float32]:
    """[length]: the part of the line from `anchor` on, 1 where it reaches outside of it."""
    places = np.arange(anchor, anchor + length)
    inside = (places >= 0) & (places < len(line))
    return np.where(inside, line[np.clip(places, 0, len(line) - 1)], np.float32(1))
