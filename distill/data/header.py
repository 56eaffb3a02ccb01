"""Height and width of an encoded image from its first bytes, without decoding it."""

from __future__ import annotations

import io

from PIL import Image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
# Start-of-frame markers; C4, C8 and CC of that range are tables, not frames.
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


MAX_PIXELS = 178_956_970
"""PIL's own limit for a decompression bomb: half a gigabyte of pixels out of a few kilobytes of file."""


def image_size(data: bytes | memoryview) -> tuple[int, int]:
    """(height, width) in pixels as stored: an EXIF rotation is not applied.

    JPEG and PNG are read here (a few microseconds), other formats through PIL's lazy open. Raises ValueError with the
    reason where the bytes are no image, or claim more pixels than MAX_PIXELS.
    """
    height, width = _stored_size(data)
    if height * width > MAX_PIXELS:
        raise ValueError(f"the header claims {height} x {width} pixels; at most {MAX_PIXELS} are decoded")
    return height, width


def _stored_size(data: bytes | memoryview) -> tuple[int, int]:
    view = memoryview(data)
    if bytes(view[:3]) == JPEG_MAGIC:
        return _jpeg_size(view)
    if bytes(view[:8]) == PNG_MAGIC and len(view) >= 24:
        return int.from_bytes(view[20:24], "big"), int.from_bytes(view[16:20], "big")
    try:
        with Image.open(io.BytesIO(view)) as image:
            return image.height, image.width
    except Exception as error:  # PIL raises half a dozen types for broken headers
        raise ValueError(f"not an image: starts with {bytes(view[:8])!r}") from error


def _jpeg_size(view: memoryview) -> tuple[int, int]:
    position, end = 2, len(view)
    while position + 9 <= end:
        if view[position] != 0xFF:
            raise ValueError(f"damaged JPEG header: byte {position} is {view[position]:#04x}, a marker starts with 0xff")
        marker = view[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif marker in JPEG_FRAMES:
            height = view[position + 5] << 8 | view[position + 6]
            width = view[position + 7] << 8 | view[position + 8]
            if height == 0 or width == 0:
                raise ValueError(f"damaged JPEG header: it says {height} x {width} pixels")
            return height, width
        elif marker in JPEG_WITHOUT_LENGTH:
            position += 2
        else:
            position += 2 + (view[position + 2] << 8 | view[position + 3])
    raise ValueError(f"truncated JPEG: no frame header in its {end} bytes")
