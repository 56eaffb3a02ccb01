"""The operations of `policy.py` as a DALI graph; DALI's modules come in as an argument, so `dali_graph.py` alone imports it.

`add_layer` is called inside of a pipeline with conditionals: its `if`s choose per image, and only the images that an
operation was drawn for go through it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from distill.data.augment.policy import (
    AUTO_CONTRAST,
    BRIGHTNESS,
    COLOR,
    CONTRAST,
    EQUALIZE,
    GAUSSIAN_BLUR,
    INVERT,
    NONE,
    POSTERIZE,
    SHARPNESS,
    SOLARIZE,
    SOLARIZE_ADD,
)

SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
SAME = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], np.float32)
"""PIL's SMOOTH kernel, towards and away from which its Sharpness blends."""


def resize(dali: SimpleNamespace, images: Any, size: Any, interpolation: str) -> Any:
    """Images resized with PIL's filters. At the border the last pixel is repeated, where PIL renormalises its filter."""
    filters = {"bilinear": dali.types.INTERP_LINEAR, "bicubic": dali.types.INTERP_CUBIC}
    return dali.fn.resize(images, size=size, interp_type=filters[interpolation], antialias=True)


def add_layer(
    dali: SimpleNamespace, images: Any, operation: Any, argument: Any, matrix: Any, fill: tuple[int, int, int]
) -> Any:
    """uint8 images after the operation of each; `dali` has DALI's `fn`, `types` and `math`.

    `matrix` is the place in the image of each output pixel, for the geometric operations.
    """
    if operation != NONE:
        if operation == AUTO_CONTRAST:
            images = auto_contrast(dali, images)
        elif operation == EQUALIZE:
            images = dali.fn.equalize(images)
        elif operation == INVERT:
            images = dali.fn.cast(255 - images, dtype=dali.types.UINT8)
        elif operation == POSTERIZE:
            images = posterize(dali, images, argument)
        elif operation == SOLARIZE:
            images = solarize(dali, images, argument)
        elif operation == SOLARIZE_ADD:
            images = solarize_add(dali, images, argument)
        elif operation == COLOR:
            images = dali.fn.saturation(images, saturation=argument)
        elif operation == CONTRAST:
            grey = dali.fn.color_space_conversion(images, image_type=dali.types.RGB, output_type=dali.types.GRAY)
            centre = dali.math.floor(dali.fn.reductions.mean(grey, dtype=dali.types.FLOAT) + 0.5)
            images = dali.fn.contrast(images, contrast=argument, contrast_center=centre.cpu())
        elif operation == BRIGHTNESS:
            images = dali.fn.brightness(images, brightness=argument)
        elif operation == SHARPNESS:
            images = dali.fn.filter(
                images, dali.types.Constant(SMOOTH) * (1.0 - argument) + dali.types.Constant(SAME) * argument
            )
        elif operation == GAUSSIAN_BLUR:
            images = dali.fn.gaussian_blur(images, sigma=argument)
        else:
            images = warp(dali, images, matrix, fill)
    return images


def mirrored(dali: SimpleNamespace, images: Any, margin: int) -> Any:
    """Images with so many rows and columns more on each side, mirrored at the outermost ones, which are not repeated."""
    first, last = slice(1, margin + 1), slice(-margin - 1, -1)
    top, bottom = (dali.fn.flip(images[rows], horizontal=0, vertical=1) for rows in (first, last))
    images = dali.fn.cat(top, images, bottom, axis=0)
    left, right = (dali.fn.flip(images[:, columns]) for columns in (first, last))
    return dali.fn.cat(left, images, right, axis=1)


def posterize(dali: SimpleNamespace, images: Any, bits: Any) -> Any:
    """The upper `bits` bits of each level: whole multiples of 2^(8 - bits)."""
    step = dali.math.pow(2.0, 8.0 - bits)
    return dali.fn.cast(dali.math.floor(images / step) * step, dtype=dali.types.UINT8)


def warp(dali: SimpleNamespace, images: Any, matrix: Any, fill: tuple[int, int, int]) -> Any:
    """Channel by channel: DALI fills what comes in from outside with one value, not with a colour."""
    channels = [
        dali.fn.warp_affine(images[:, :, channel : channel + 1], matrix=matrix, inverse_map=True, fill_value=float(level))
        for channel, level in enumerate(fill)
    ]
    return dali.fn.cat(*channels, axis=2)


def auto_contrast(dali: SimpleNamespace, images: Any) -> Any:
    """Each channel stretched to 0..255; a constant channel stays as it is."""
    low = dali.fn.cast(dali.fn.reductions.min(images, axes=(0, 1), keep_dims=True), dtype=dali.types.FLOAT)
    high = dali.fn.cast(dali.fn.reductions.max(images, axes=(0, 1), keep_dims=True), dtype=dali.types.FLOAT)
    flat = dali.fn.cast(high <= low, dtype=dali.types.FLOAT)
    scale = 255.0 / dali.math.max(high - low, 1.0) * (1.0 - flat) + flat
    stretched = (images - low * (1.0 - flat)) * scale
    return dali.fn.cast(dali.math.floor(dali.math.clamp(stretched + 1e-3, 0.0, 255.0)), dtype=dali.types.UINT8)


def solarize(dali: SimpleNamespace, images: Any, threshold: Any) -> Any:
    """Levels from the threshold on inverted."""
    above = dali.fn.cast(images >= threshold, dtype=dali.types.FLOAT)
    return dali.fn.cast(images + above * (255.0 - 2.0 * images), dtype=dali.types.UINT8)


def solarize_add(dali: SimpleNamespace, images: Any, addend: Any) -> Any:
    """Levels below 128 raised, to at most 255."""
    below = dali.fn.cast(images < 128, dtype=dali.types.FLOAT)
    return dali.fn.cast(dali.math.clamp(images + below * addend, 0.0, 255.0), dtype=dali.types.UINT8)
