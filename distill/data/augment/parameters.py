"""Augmentation parameters and evaluation geometry, computed on the host for whole batches.

The parameters of a training image are a pure function of (seed, epoch, position of the image in the epoch), or of (seed,
view, sample) where views are counted, so the pixel pipelines that apply them have no random state: any position can be
produced at any time, on any number of processes, and two implementations can be compared pixel by pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from distill.data.augment.policy import (
    JITTER_LAYERS,
    THREE_NUMBERS,
    draw_color_jitter,
    draw_rand_augment,
    draw_three_augment,
    parse_rand_augment,
)
from distill.protocols import InputSpec, Interpolation
from distill.seeds import derive_seed

Crop = Literal["random_resized", "pad", "simple_random", "resize"]

TRIES = 10
"""Windows that random-resized-crop draws before it falls back to the centre, as torchvision and timm do."""
WINDOW_NUMBERS = 2 * TRIES + 2
"""Uniform numbers of the crop: area and ratio of each try, then vertical and horizontal position."""
FLIP_NUMBER = WINDOW_NUMBERS
LAYER_NUMBERS = FLIP_NUMBER + 1
NUMBERS = 64
"""Uniform numbers per image: 22 crop, 1 flip, 5 for each of at most 8 layers, 1 spare; a multiple of Philox' 4."""
BLOCKS = NUMBERS // 4
"""Steps of Philox' counter per image; each gives four numbers."""


@dataclass(frozen=True)
class TrainTransform:
    """The settings of a training view: all that happens to an image before it becomes uint8 pixels of the wanted size.

    `crop` is `random_resized` (a window of `scale` of the area and `ratio` of the sides, resized), `pad` (a window of the
    wanted size out of the image padded by `padding` black pixels on each side; nothing is resized), `simple_random` (the
    same out of the image resized to cover the wanted size and padded by mirrored pixels: DeiT III) or `resize` (the whole
    image). `flip` is the probability of a horizontal flip. Raises ValueError for values that make no sense: a line for each
    of them, which begins with the field's name.
    """

    crop: Crop = "random_resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: float = 0.5
    interpolation: Interpolation = "bilinear"
    rand_augment: str | None = None
    """timm's notation, such as `rand-m9-mstd0.5-inc1`; after the flip."""
    three_augment: bool = False
    """One of grey, solarised and blurred, after the flip: 3-Augment of DeiT III. Not together with `rand_augment`."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation by up to this share; last. Not together with `rand_augment`, as timm."""
    fill: tuple[int, int, int] = (124, 116, 104)
    """The colour that comes in from outside in rotations and shifts: ImageNet's mean."""

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if self.crop not in get_args(Crop):
            yield f"crop {self.crop!r}: must be one of {', '.join(get_args(Crop))}"
        if self.interpolation not in get_args(Interpolation):
            yield f"interpolation {self.interpolation!r}: must be one of {', '.join(get_args(Interpolation))}"
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            yield f"scale {self.scale}: must be two shares of the area, 0 < least <= most <= 1"
        if not 0 < self.ratio[0] <= self.ratio[1]:
            yield f"ratio {self.ratio}: must be two ratios of width to height, 0 < least <= most"
        if self.padding < 0:
            yield f"padding {self.padding}: must not be negative"
        if not 0 <= self.flip <= 1:
            yield f"flip {self.flip}: must be a probability between 0 and 1"
        if self.color_jitter < 0:
            yield f"color_jitter {self.color_jitter}: must not be negative"
        if self.color_jitter and self.rand_augment is not None:
            yield f"color_jitter {self.color_jitter} with rand_augment {self.rand_augment!r}: give one of them"
        if self.three_augment and self.rand_augment is not None:
            yield f"three_augment with rand_augment {self.rand_augment!r}: give one of them"
        if self.rand_augment is not None:
            try:
                parse_rand_augment(self.rand_augment)
            except ValueError as error:
                yield str(error)

    @property
    def num_layers(self) -> int:
        """Layers of operations that follow the flip."""
        if self.rand_augment is not None:
            return parse_rand_augment(self.rand_augment).layers
        return int(self.three_augment) + (JITTER_LAYERS if self.color_jitter else 0)

    @property
    def mirrored(self) -> int:
        """Mirrored pixels around the resized image, out of which the view is cut."""
        return self.padding if self.crop == "simple_random" else 0


def uniforms(seed: int, epoch: int, first: int, count: int) -> NDArray[np.float64]:
    """float64 [count, NUMBERS] in [0, 1): the random numbers of positions `first` to `first + count` of an epoch.

    Counter-based: row i depends on position `first + i` alone, not on where the block starts.
    """
    key = derive_seed(seed, "augment", epoch)
    raw = np.random.Philox(key=key, counter=first * BLOCKS).random_raw(count * NUMBERS)
    return _unit_interval(raw.reshape(count, NUMBERS))


def view_uniforms(seed: int, view: int, samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [len(samples), NUMBERS] in [0, 1): the random numbers of these samples in a view, whatever batch they are in.

    Row i is `uniforms(seed, view, samples[i], 1)`, bit for bit: a view is an epoch whose positions are the samples.
    """
    # one generator that jumps from sample to sample takes a quarter of the time of one for each
    generator, at = np.random.Philox(key=derive_seed(seed, "augment", view)), 0
    raw = np.empty((len(samples), NUMBERS), np.uint64)
    for row, sample in enumerate(samples.tolist()):
        generator.advance(sample * BLOCKS - at)
        raw[row] = generator.random_raw(NUMBERS)
        at = (sample + 1) * BLOCKS
    return _unit_interval(raw)


def _unit_interval(raw: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The upper 53 bits of each, which a float64 holds exactly."""
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_windows(
    transform: TrainTransform, sizes: NDArray[np.int64], out_size: tuple[int, int], numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    """int64 [B, 4], (top, left, height, width) of each image's window, from `sizes` [B, 2] as (height, width).

    A `pad` or `simple_random` window has the size `out_size` and may reach outside of the image, top and left may then be
    negative. For `simple_random` the `sizes` are those of the resized images.
    """
    if transform.crop == "random_resized":
        return _random_resized_windows(transform, sizes, numbers)
    if transform.crop in ("pad", "simple_random"):
        return _pad_windows(transform.padding, sizes, out_size, numbers)
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)  # resize: the whole image


def flips(transform: TrainTransform, numbers: NDArray[np.float64]) -> NDArray[np.int32]:
    """int32 [B]: 1 where the image is flipped left to right."""
    return (numbers[:, FLIP_NUMBER] < transform.flip).astype(np.int32)


def layers(
    transform: TrainTransform, size: tuple[int, int], numbers: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The operations after the flip, int32 [B, L], and their arguments, float32 [B, L], for output of `size`."""
    if transform.rand_augment is not None:
        return draw_rand_augment(parse_rand_augment(transform.rand_augment), size, numbers[:, LAYER_NUMBERS:])
    drawn = [(np.zeros((len(numbers), 0), np.int32), np.zeros((len(numbers), 0), np.float32))]
    first = LAYER_NUMBERS
    if transform.three_augment:
        drawn.append(draw_three_augment(numbers[:, first:]))
        first += THREE_NUMBERS
    if transform.color_jitter:
        drawn.append(draw_color_jitter(transform.color_jitter, numbers[:, first:]))
    operations, arguments = zip(*drawn, strict=True)
    return np.concatenate(operations, axis=1), np.concatenate(arguments, axis=1)


def covering_sizes(sizes: NDArray[np.int64], out_size: tuple[int, int]) -> NDArray[np.int64]:
    """int64 [B, 2]: each image's size after resizing it, its shape kept, so that it just covers `out_size`; the longer side
    truncated, as torchvision's Resize."""
    wanted = np.broadcast_to(np.array(out_size, np.int64), sizes.shape)
    tight = (sizes / wanted).argmin(axis=1)[:, None]
    one, other = np.take_along_axis(wanted, tight, axis=1), np.take_along_axis(sizes, tight, axis=1)
    return np.maximum(np.where(np.arange(2) == tight, one, one * sizes // other), wanted)


def _random_resized_windows(
    transform: TrainTransform, sizes: NDArray[np.int64], numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    """torchvision's and timm's algorithm, all tries of all images at once; the first try that fits is taken."""
    low, high = transform.scale
    log_low, log_high = math.log(transform.ratio[0]), math.log(transform.ratio[1])
    height, width = sizes[:, 0], sizes[:, 1]
    area = (height * width)[:, None] * (low + (high - low) * numbers[:, 0 : 2 * TRIES : 2])
    ratio = np.exp(log_low + (log_high - log_low) * numbers[:, 1 : 2 * TRIES : 2])
    tried_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # rint rounds halves to even, as Python's round does
    tried_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= width[:, None]) & (tried_h > 0) & (tried_h <= height[:, None])
    rows, first = np.arange(len(sizes)), fits.argmax(axis=1)
    some = fits.any(axis=1)
    central_h, central_w = _central_sizes(transform.ratio, height, width)
    crop_h = np.where(some, tried_h[rows, first], central_h)
    crop_w = np.where(some, tried_w[rows, first], central_w)
    free_h, free_w = height - crop_h, width - crop_w
    top = np.where(some, _integers(numbers[:, 2 * TRIES], free_h), free_h // 2)
    left = np.where(some, _integers(numbers[:, 2 * TRIES + 1], free_w), free_w // 2)
    return np.stack([top, left, crop_h, crop_w], axis=1)


def _central_sizes(
    ratio: tuple[float, float], height: NDArray[np.int64], width: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The largest window of an allowed ratio: the fallback for extreme images. At least one pixel (2000 x 1 images)."""
    shape = width / height
    crop_h = np.where(shape < ratio[0], np.rint(width / ratio[0]), height)
    crop_w = np.where(shape > ratio[1], np.rint(height * ratio[1]), width)
    return np.clip(crop_h, 1, height).astype(np.int64), np.clip(crop_w, 1, width).astype(np.int64)


def _pad_windows(
    padding: int, sizes: NDArray[np.int64], out_size: tuple[int, int], numbers: NDArray[np.float64]
) -> NDArray[np.int64]:
    wanted = np.broadcast_to(np.array(out_size, np.int64), sizes.shape)
    free = sizes + 2 * padding - wanted
    # An image smaller than the window even when padded lies anywhere inside it: free < 0, the same draw with the sign kept.
    offset = np.sign(free) * _integers(numbers[:, 2 * TRIES : 2 * TRIES + 2], np.abs(free))
    return np.concatenate([offset - padding, wanted], axis=1)


def _integers(numbers: NDArray[np.float64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Uniform integers in 0..most; float64 has 53 bits, so the product stays below `most + 1`."""
    return np.floor(numbers * (most + 1)).astype(np.int64)


def eval_geometry(sizes: NDArray[np.int64], spec: InputSpec) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The size to resize each image to, int64 [B, 2], and the (top, left) of the centre crop after it, int64 [B, 2].

    `sizes` is int64 [B, 2] as (height, width). The integers are those of timm's `transforms_imagenet_eval` in its `center`
    mode: a square target truncates the longer side (torchvision's Resize), a target with two different sides rounds both
    (timm's ResizeKeepRatio); the crop's anchor rounds halves to even (torchvision's CenterCrop). A negative anchor means
    that black is added around the image, as CenterCrop does.
    """
    crop = np.array([spec.height, spec.width], np.int64)
    scaled = np.array([math.floor(side / spec.crop_fraction) for side in (spec.height, spec.width)], np.int64)
    if scaled[0] == scaled[1]:
        short = sizes.min(axis=1, keepdims=True)
        # Python's int(a * b / c) in torchvision: the same float division, so the same truncation.
        resized = np.where(sizes == short, scaled[0], (scaled[0] * sizes / short).astype(np.int64))
    else:
        ratio = (sizes / scaled).min(axis=1, keepdims=True)
        resized = np.rint(sizes / ratio).astype(np.int64)
    return resized, _centre(resized, crop)


def _centre(resized: NDArray[np.int64], crop: NDArray[np.int64]) -> NDArray[np.int64]:
    """Anchors of the centre crop: rounded half to even where the image is larger, where it is smaller the padding of
    torchvision's CenterCrop, which puts the smaller half before the image."""
    free = resized - crop
    return np.where(free >= 0, np.rint(free / 2), -((-free) // 2)).astype(np.int64)
