"""Splits with planted faults: image bytes that are bad in every known way, and odd ones that are not bad at all."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distill.data.index import RECORD, ShardIndex, ShardInfo, write_split
from distill.data.reader import END_OF_IMAGE
from shards.writer import TarWriter

FLIPS = {"3 bytes changed on disk": 3, "200 bytes changed on disk": 200}
"""Done to the shard after it was indexed: the image still decodes, to wrong pixels."""


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png(image: bytes) -> bytes:
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
    return encoded(Image.fromarray(pixels), "PNG")  # without a colour profile, whose damage would not matter


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _zeroed(data: bytes) -> bytes:
    return data[:60] + bytes(40) + data[100:]


def _rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif)


BAD: dict[str, Callable[[bytes], bytes]] = {
    "half": _half,
    "header only": lambda jpeg: jpeg[:180],
    "zero bytes": lambda _: b"",
    "garbage": lambda _: np.random.default_rng(0).bytes(2000),
    "html": lambda _: b"<html><body>404 not found</body></html>",
    "last 100 bytes missing": lambda jpeg: jpeg[:-100],
    "no end marker": lambda jpeg: jpeg[:-2],
    "no scan": lambda jpeg: jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
    "half a PNG": lambda jpeg: _half(_png(jpeg)),
    "damaged PNG": lambda jpeg: _zeroed(_png(jpeg)),
    "two bytes": lambda _: b"\xff\xd8",
    "no frame": lambda _: b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xd9",
}
"""Every kind of bad image bytes, out of a JPEG: some fail the reader's cheap checks, some only the decoder."""

ODD: dict[str, Callable[[Image.Image], bytes]] = {
    "PNG": lambda image: encoded(image, "PNG"),
    "PNG with transparency": lambda image: encoded(image.convert("RGBA"), "PNG"),
    "PNG with a palette": lambda image: encoded(image.quantize(32), "PNG"),
    "16-bit PNG": lambda image: encoded(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "PNG"),
    "WebP": lambda image: encoded(image, "WEBP"),
    "BMP": lambda image: encoded(image, "BMP"),
    "TIFF": lambda image: encoded(image, "TIFF"),
    "JPEG 2000": lambda image: encoded(image, "JPEG2000"),
    "GIF": lambda image: encoded(image, "GIF"),
    "AVIF": lambda image: encoded(image, "AVIF"),
    "CMYK": lambda image: encoded(image.convert("CMYK")),
    "grey": lambda image: encoded(image.convert("L")),
    "progressive": lambda image: encoded(image, progressive=True),
    "EXIF rotation": _rotated,
    "trailing junk": lambda image: encoded(image) + bytes(1000),
    "1 x 1": lambda image: encoded(image.resize((1, 1))),
    "2000 x 3": lambda image: encoded(image.resize((2000, 3))),
}
"""Every kind of image that is not a plain RGB JPEG and yet is none to refuse; a split has all of them as `.jpg`."""


def stored_size(data: bytes) -> tuple[int, int]:
    """(height, width) by the header; 40 x 40 where there is none, as of an image that was damaged after it was indexed."""
    try:
        image = Image.open(io.BytesIO(data))
    except OSError:
        return 40, 40
    return image.height, image.width


def raw_split(
    folder: Path,
    images: Sequence[bytes],
    shards: int = 3,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = tuple("abcde"),
    sizes: Mapping[int, tuple[int, int]] | None = None,
) -> ShardIndex:
    """A split of exactly these bytes, good or bad: preparation would not let the bad ones in. Image n has the key `kNNN`.

    sizes: (height, width) that the index shall have of an image, where that is not what the image's header says.
    """
    folder.mkdir(parents=True)
    rows, infos = [], []
    for shard in range(shards):
        name = f"train-{shard:04d}.tar"
        members = range(shard, len(images), shards)
        with (folder / name).open("wb") as file:
            tar = TarWriter(file)
            for number in members:
                label = number % len(class_names) if labels is None else labels[number]
                tar.add(f"k{number:03d}.cls", b"%d" % label)
                offset = tar.add(f"k{number:03d}.jpg", images[number])
                data = images[number]
                rows.append((offset, shard, len(data), label, zlib.crc32(data), *(sizes or {}).get(number, stored_size(data))))
            sha = tar.finish()
        infos.append(ShardInfo(name, len(members), tar.position, sha))
    write_split(folder, infos, np.array(rows, RECORD), class_names)
    return ShardIndex.open(folder)


def planted_split(
    folder: Path, originals: Sequence[bytes], labels: Sequence[int], class_names: Sequence[str], count: int, share: float
) -> dict[str, str]:
    """A split of `count` images, the originals over and over, in which `share` of the images are bad and odd in each way.

    The kind of each bad sample by its key.
    """
    each = max(1, round(share * count))
    dice = np.random.default_rng(0)
    places = iter(dice.permutation(count).tolist())
    images = [originals[number % len(originals)] for number in range(count)]
    # the end marker of an embedded thumbnail hides that the image's own is missing
    plain = [data for data in originals if data.count(END_OF_IMAGE) == 1]
    bad: dict[str, str] = {}
    flips: dict[str, int] = {}
    for kind in [*BAD, *FLIPS] * each:
        number = next(places)
        bad[f"k{number:03d}"] = kind
        if kind in FLIPS:
            flips[f"k{number:03d}"] = FLIPS[kind]
        else:
            images[number] = BAD[kind](plain[number % len(plain)])
    for make in list(ODD.values()) * each:
        number = next(places)
        images[number] = make(Image.open(io.BytesIO(images[number])).convert("RGB"))
    index = raw_split(folder, images, 8, [labels[number % len(labels)] for number in range(count)], class_names)
    numbers = {index.key(sample): sample for sample in range(count)}
    for key, flipped in flips.items():
        flip_on_disk(index, numbers[key], flipped)
    return bad


def flip_on_disk(index: ShardIndex, sample: int, count: int) -> None:
    """Inverts `count` bytes in the middle of the sample's image, in its shard."""
    offset, shard, size, *_ = index.records[sample].item()
    with index.shard_path(shard).open("r+b") as file:
        file.seek(offset + size // 2)
        data = file.read(count)
        file.seek(offset + size // 2)
        file.write(bytes(255 - value for value in data))
