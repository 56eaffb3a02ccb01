"""timm's RandAugment, 3-Augment and colour jitter as layers of operations, all parameters drawn on the host.

A layer is an operation and its argument per image; both loaders apply the layers in their order. Source: timm 1.0.31,
`timm/data/auto_augment.py`. Where we differ: geometric operations interpolate bilinearly whatever the crop does.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NONE, AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD = range(8)
COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(8, 16)
GAUSSIAN_BLUR = 16
CHOICES = np.arange(AUTO_CONTRAST, TRANSLATE_Y + 1)
"""The operations of RandAugment's default set in timm, each as likely as any other."""
LEVELS = 10.0
"""timm's `_LEVEL_DENOM`: the magnitude at which an operation is at its full range."""
NUMBERS_PER_LAYER = 5
MAX_LAYERS = 8
JITTER_LAYERS = 3
THREE_NUMBERS = 2
BLUR_RADIUS = (0.1, 2.0)


@dataclass(frozen=True)
class RandAugment:
    """timm's settings: magnitude and its standard deviation, layers, probability of a layer, increasing severity."""

    magnitude: float = 10.0
    deviation: float = 0.0
    """math.inf draws the magnitude uniformly between 0 and `magnitude`."""
    limit: float = LEVELS
    layers: int = 2
    probability: float = 0.5
    increasing: bool = False


def parse_rand_augment(text: str) -> RandAugment:
    """The settings in timm's notation, such as `rand-m9-mstd0.5-inc1`.

    Raises ValueError for anything that timm would not take or that is not rebuilt here (`t`, other transform sets).
    """
    name, *sections = text.split("-")
    values: dict[str, float] = {}
    for section in sections:
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)", section)
        if match is None or name != "rand":
            break
        values[match[1]] = float(match[2])
    else:
        settings = RandAugment(
            magnitude=values.get("m", LEVELS),
            deviation=math.inf if values.get("mstd", 0) > 100 else values.get("mstd", 0.0),
            limit=values.get("mmax", LEVELS),
            layers=int(values.get("n", 2)),
            probability=values.get("p", 0.5),
            increasing=bool(values.get("inc", 0)),
        )
        if name == "rand" and 1 <= settings.layers <= MAX_LAYERS and settings.probability <= 1:
            return settings
    raise ValueError(
        f"rand_augment {text!r}: must be like 'rand-m9-mstd0.5-inc1', with m, mstd, mmax, n (1 to {MAX_LAYERS}), p (to 1), inc"
    )


def draw_rand_augment(
    settings: RandAugment, size: tuple[int, int], numbers: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Operations int32 [B, L] and their arguments float32 [B, L] for images of `size` (height, width).

    `numbers` is [B, >= 5 L], uniform in [0, 1): operation, whether, two for a normal deviate, sign.
    """
    drawn = numbers[:, : settings.layers * NUMBERS_PER_LAYER].reshape(len(numbers), settings.layers, NUMBERS_PER_LAYER)
    choice, applied, one, two, sign = np.moveaxis(drawn, 2, 0)
    operations = CHOICES[(choice * len(CHOICES)).astype(np.int64)]
    if math.isinf(settings.deviation):
        magnitude = one * settings.magnitude
    else:
        normal = np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * np.pi * two)  # Box and Muller; 1 - one is never 0
        magnitude = settings.magnitude + settings.deviation * normal
    level = np.clip(magnitude, 0, settings.limit) / LEVELS
    arguments = _arguments(operations, level, np.where(sign < 0.5, -1.0, 1.0), settings.increasing, size)
    operations = np.where(applied < settings.probability, operations, NONE)
    return operations.astype(np.int32), arguments.astype(np.float32)


def _arguments(
    operations: NDArray[np.int64],
    level: NDArray[np.float64],
    sign: NDArray[np.float64],
    increasing: bool,
    size: tuple[int, int],
) -> NDArray[np.float64]:
    """timm's level functions, all at once: degrees, bits, threshold, addend, blend factor, shear, pixels."""
    bits, threshold = np.floor(level * 4), np.minimum(256, np.floor(level * 256))
    table = {
        ROTATE: sign * level * 30,
        POSTERIZE: 4 - bits if increasing else bits,
        SOLARIZE: 256 - threshold if increasing else threshold,
        SOLARIZE_ADD: np.minimum(128, np.floor(level * 110)),
        SHEAR_X: sign * level * 0.3,
        SHEAR_Y: sign * level * 0.3,
        TRANSLATE_X: sign * level * 0.45 * size[1],
        TRANSLATE_Y: sign * level * 0.45 * size[0],
    }
    blend = np.maximum(0.1, 1 + sign * level * 0.9) if increasing else level * 1.8 + 0.1
    table |= dict.fromkeys((COLOR, CONTRAST, BRIGHTNESS, SHARPNESS), blend)
    arguments = np.zeros_like(level)
    for operation, values in table.items():
        arguments = np.where(operations == operation, values, arguments)
    return arguments


def draw_three_augment(numbers: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """3-Augment's one operation of each image, each as likely: grey, levels from 128 on inverted, Gaussian blur.

    int32 [B, 1] and float32 [B, 1]; `numbers` is [B, >= 2], uniform in [0, 1): which, and the radius of the blur. Source:
    Touvron et al. 2022 (DeiT III); timm's policy `3a`.
    """
    low, high = BLUR_RADIUS
    which = (numbers[:, 0] * 3).astype(np.int64)
    operations = np.array([COLOR, SOLARIZE, GAUSSIAN_BLUR], np.int32)[which]
    radius = low + (high - low) * numbers[:, 1]
    arguments = np.choose(which, [0.0, 128.0, radius])  # colour by a factor of 0 is grey
    return operations[:, None], arguments[:, None].astype(np.float32)


def draw_color_jitter(strength: float, numbers: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Brightness, contrast and saturation in random order, each by a factor in [1 - strength, 1 + strength], as timm.

    int32 [B, 3] and float32 [B, 3]; `numbers` is [B, >= 6], uniform in [0, 1).
    """
    order = np.argsort(numbers[:, :JITTER_LAYERS], axis=1, kind="stable")
    operations = np.array([BRIGHTNESS, CONTRAST, COLOR], np.int32)[order]
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * numbers[:, JITTER_LAYERS : 2 * JITTER_LAYERS]
    return operations, factors.astype(np.float32)


def affine_matrices(
    operations: NDArray[np.int32], arguments: NDArray[np.float32], size: tuple[int, int]
) -> NDArray[np.float64]:
    """[B, 2, 3]: output pixel (x, y, 1) -> place in the image, pixel centres at halves; identity for other operations."""
    matrices = np.tile(np.eye(2, 3), (len(operations), 1, 1))
    values = arguments.astype(np.float64)
    matrices[:, 0, 1] = np.where(operations == SHEAR_X, values, 0)
    matrices[:, 1, 0] = np.where(operations == SHEAR_Y, values, 0)
    matrices[:, 0, 2] = np.where(operations == TRANSLATE_X, values, 0)
    matrices[:, 1, 2] = np.where(operations == TRANSLATE_Y, values, 0)
    turned = operations == ROTATE
    angle = -np.radians(values[turned])
    cosine, sine = np.cos(angle), np.sin(angle)
    centre_y, centre_x = size[0] / 2, size[1] / 2
    matrices[turned, 0] = np.stack([cosine, sine, centre_x - cosine * centre_x - sine * centre_y], axis=1)
    matrices[turned, 1] = np.stack([-sine, cosine, centre_y + sine * centre_x - cosine * centre_y], axis=1)
    return matrices
