"""What the host makes of encoded images and of decoded ones, by Pillow and by torch's version of its filters."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from distill.data.augment.pil_ops import apply_operation
from distill.data.batch_plan import Plan, Work
from distill.data.reader import BadSample

PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes) -> Image.Image:
    """The image as RGB; EXIF rotation is not applied, as timm does not. Raises BadSample with PIL's reason."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise BadSample(f"not an image: starts with {data[:8]!r}") from error
    except Exception as error:  # PIL raises many types for broken files
        raise BadSample(f"does not decode: {type(error).__name__}: {error}"[:200]) from error


def decode_as_indexed(data: bytes, size: Sequence[int]) -> Image.Image:
    """The image as RGB. Raises BadSample as `decode` does, and where it has not the `size` (height, width) of the index."""
    image = decode(data)
    if (image.height, image.width) != tuple(size):
        raise BadSample(f"{image.height} x {image.width} pixels, the index says {size[0]} x {size[1]}")
    return image


def transform_image(image: Image.Image, work: Work, row: int, plan: Plan) -> np.ndarray:
    """uint8 [H, W, 3], (H, W) = `plan.size`: row `row` of `work`, done to the image; nothing is resized to its own size."""
    top, left, height, width = work.windows[row].tolist()
    if (height, width) != (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    resized_h, resized_w = work.resized[row].tolist()
    if (resized_h, resized_w) != (height, width):
        image = image.resize((resized_w, resized_h), PIL_FILTERS[plan.interpolation])
    if margin := plan.mirrored:
        image = Image.fromarray(np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="reflect"))
    top, left = (work.anchors[row] + margin).tolist()
    if (top, left, image.height, image.width) != (0, 0, *plan.size):
        image = image.crop((left, top, left + plan.size[1], top + plan.size[0]))
    if work.flips[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, argument in zip(work.operations[row].tolist(), work.arguments[row].tolist(), strict=True):
        image = apply_operation(image, operation, argument, plan.fill)
    return np.asarray(image)


def transform_window(window: NDArray[np.uint8], out: NDArray[np.uint8], work: Work, row: int, plan: Plan) -> None:
    """Row `row` of `work`, done to its decoded window, uint8 [h, w, 3], into `out`, uint8 [H, W, 3]."""
    if plan.exact:
        out[:] = transform_image(Image.fromarray(window), work, row, plan)
    else:
        resize_and_flip(window, out, bool(work.flips[row]), plan.interpolation)


def resize_and_flip(image: NDArray[np.uint8], out: NDArray[np.uint8], flip: bool, interpolation: str) -> None:
    """uint8 [H, W, 3] into `out`, uint8 of another height and width, by torch's version of Pillow's filters.

    A third of Pillow's time; one value in 300 is another level, by at most 2. An image of the size of `out` is not changed.
    """
    if image.shape != out.shape:
        resized = np.empty_like(out) if flip else out
        # what `interpolate` calls, which has no `out` and would hand back planes: turned into pixels at half of the cost again
        resize = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
        source, target = (torch.from_numpy(each).permute(2, 0, 1)[None] for each in (image, resized))
        resize(source, out.shape[:2], False, None, None, out=target)
        image = resized
    # by NumPy: torch would start a team of threads in each of ours
    if flip:
        out.view("V3")[:] = image.view("V3")[:, ::-1]  # whole pixels: byte by byte takes three times as long
    elif image is not out:
        out[:] = image


def as_png(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image that PIL decodes and DALI does not (GIF, AVIF), in a format that both do; the pixels are the same."""
    return png_bytes(decode(data.tobytes()))


def png_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [size]: the image as a PNG file."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return np.frombuffer(encoded.getvalue(), np.uint8)
