"""One image's way into a shard: decoded once in full, kept as it is, repaired without loss, or refused with a reason."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from distill.data.index import MAX_SIDE
from distill.data.reader import END_OF_IMAGE, TAIL
from distill.files import what_starts

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose bytes are kept; every other readable format becomes a PNG with the same pixels."""
EXIF_ORIENTATION = 0x0112
PNG_DEPTH = 24
"""Where a PNG file has its bits per channel."""


class Unclean(ValueError):
    """The bytes are no image that can be repaired without loss; the text is the reason."""


@dataclass(frozen=True)
class Clean:
    """An image ready for a shard, and what was noted or done on the way."""

    data: bytes
    extension: str
    size: tuple[int, int]
    """(height, width) in pixels as stored."""
    notes: tuple[str, ...] = ()


def clean_image(data: bytes, resize_short: int | None = None, quality: int = 90) -> Clean:
    """The image decoded in full and made fit for a shard; raises Unclean where that is not possible.

    Kept bit for bit: 8-bit JPEG (grey or RGB), PNG and WebP. Re-encoded as PNG with the same pixels: CMYK JPEG, 16-bit
    images (scaled to 8 bits), every other format (its first frame). `resize_short` shrinks an image whose shorter side is
    larger and encodes it as JPEG of `quality`; that is a loss, for training splits of slow machines.
    """
    if not data:
        raise Unclean("zero bytes")
    whole = data.rfind(END_OF_IMAGE, -TAIL) >= 0
    image, kind = _decode(data, pixels=resize_short is not None or not whole)
    if image.mode == "F" or (image.mode == "I" and kind == "TIFF"):
        raise Unclean(f"32-bit pixels ({kind}): nothing says which of their values are black and white")
    try:
        clean = _cleaned(data, image, kind, whole, resize_short, quality)
    except (OSError, ValueError) as error:  # longer than 65,500 pixels, or colours that have no way to RGB
        raise Unclean(f"cannot be encoded: {type(error).__name__}: {error}"[:200]) from error
    if max(clean.size) > MAX_SIDE:
        raise Unclean(f"{clean.size[0]} x {clean.size[1]} pixels: a side may have {MAX_SIDE}, as in a JPEG")
    return clean


def _cleaned(data: bytes, image: Image.Image, kind: str, whole: bool, resize_short: int | None, quality: int) -> Clean:
    notes = _notes(image, kind)
    if resize_short is not None and min(image.size) > resize_short:
        small = _shrunk(image, resize_short)
        return Clean(_encoded(small, "JPEG", quality=quality), "jpg", (small.height, small.width), notes)
    size = (image.height, image.width)
    if problem := _unfit(data, image, kind, whole):
        return Clean(_encoded(_rgb(image), "PNG"), "png", size, (*notes, problem))
    return Clean(data, EXTENSIONS[kind], size, notes)


def _unfit(data: bytes, image: Image.Image, kind: str, whole: bool) -> str | None:
    """The note on an image whose bytes cannot be kept: why, and what is done; None for all others."""
    if kind not in EXTENSIONS:
        return f"{kind} re-encoded as PNG"
    if image.mode == "CMYK":
        return "CMYK re-encoded as RGB PNG"
    if image.mode.startswith("I") or (kind == "PNG" and data[PNG_DEPTH] == 16):  # PIL and DALI round 16-bit colours differently
        return "16-bit re-encoded as 8-bit PNG"
    if EXTENSIONS[kind] == "jpg" and not whole:
        return "JPEG without an end marker near its end re-encoded as PNG"
    return None


def _decode(data: bytes, pixels: bool) -> tuple[Image.Image, str]:
    """The decoded image and its format. Without `pixels` the luma of a colour JPEG is enough: all of the stream is decoded,
    which is what can fail, and a third of the time goes into colours that nobody looks at."""
    try:
        with warnings.catch_warnings():
            # more than 179 million pixels: half a gigabyte out of what may be a few kilobytes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if not pixels and (image.format, image.mode) == ("JPEG", "RGB"):
                image.draft("L", None)
            image.load()
    except UnidentifiedImageError as error:  # its text holds a memory address
        what = what_starts(data[:64])
        raise Unclean(f"not an image: {what}") from error
    except Exception as error:  # PIL raises many types for broken files; each is a reason to refuse this one image
        raise Unclean(f"does not decode: {type(error).__name__}: {error}"[:200]) from error
    return image, image.format or "unknown"


def _notes(image: Image.Image, kind: str) -> tuple[str, ...]:
    notes = []
    if "exif" in image.info:
        try:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        except Exception as error:  # a damaged EXIF block does not make the pixels wrong
            notes.append(f"unreadable EXIF: {type(error).__name__}")
        else:
            if orientation != 1:
                notes.append(f"EXIF orientation {orientation}, pixels kept as stored")
    if (kind == "PNG" and "transparency" in image.info) or image.mode in ("RGBA", "LA"):
        notes.append("transparency dropped when read")
    return tuple(notes)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: PIL's convert clips, so scale
        array = np.asarray(image).astype(np.int64)
        return Image.fromarray((np.clip(array, 0, 65535) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _shrunk(image: Image.Image, short: int) -> Image.Image:
    factor = short / min(image.size)
    size = (max(short, round(image.width * factor)), max(short, round(image.height * factor)))
    return _rgb(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()
