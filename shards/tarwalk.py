"""The members of a tar archive by a walk over its headers: where each one's content lies, without reading it.

About ten times as fast as `tarfile` for archives of a million members. Reads USTAR, PAX (as the webdataset package writes)
and GNU long names; links, folders and other special members are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from distill.data.index import TAR_BLOCK

REGULAR = (b"0", b"\0", b"7")
EXTENDED_LIMIT = 1 << 20
"""Bytes of a PAX or long-name header; a real one has a few hundred, and it is read into memory whole."""


class Member(NamedTuple):
    """A regular file in an archive: `size` bytes at `offset` of the file that the archive lies in."""

    name: str
    offset: int
    size: int


class BrokenTar(ValueError):
    """The archive ends early or has a damaged header; the text says where."""


def walk_tar(file: BinaryIO, start: int = 0, end: int | None = None, marked: bool = True) -> Iterator[Member]:
    """Every regular member of the archive at `start` of `file` (and, for one inside of another, up to `end`).

    Raises BrokenTar, naming the offset, where a header is damaged, a member reaches over the end, or the archive stops
    without its end marker; with `marked` false it may stop behind a member, as some tools leave it and others read it.
    """
    if end is None:
        end = file.seek(0, 2)
    position = start
    override: dict[str, str] = {}
    while position + TAR_BLOCK <= end:
        file.seek(position)
        block = file.read(TAR_BLOCK)
        if not block.strip(b"\0"):
            return
        name, size, kind = _parse(block, position, override)
        content = position + TAR_BLOCK
        if content + size > end:
            raise BrokenTar(f"member {name} at offset {position} needs {size} bytes, {end - content} are there: truncated")
        if kind in (b"x", b"L"):
            if size > EXTENDED_LIMIT:
                raise BrokenTar(
                    f"the extended header at offset {position} claims {size} bytes; at most {EXTENDED_LIMIT} are read"
                )
            override |= _extended(kind, file.read(size))
        elif kind != b"g":
            override = {}
            if kind in REGULAR:
                yield Member(name, content, size)
        position = content + size + (-size % TAR_BLOCK)
    if end == start:
        raise BrokenTar("an empty file")
    if marked or position != end:
        raise BrokenTar(f"the archive ends at offset {position} without its end marker: truncated")


def _parse(block: bytes, position: int, override: dict[str, str]) -> tuple[str, int, bytes]:
    stored = block[148:156].strip(b" \0")
    try:
        if int(stored, 8) != sum(block[:148]) + sum(block[156:]) + 8 * 32:
            raise BrokenTar(f"damaged header at offset {position}: its checksum does not fit")
        # sizes of 8 GiB and more are stored in base 256, marked by the first bit
        number = block[124:136]
        size = int.from_bytes(number[4:], "big") if number[0] & 0x80 else int(number.strip(b" \0") or b"0", 8)
    except ValueError as error:
        if isinstance(error, BrokenTar):
            raise
        raise BrokenTar(f"no tar header at offset {position}") from error
    prefix = block[345:500].rstrip(b"\0") if block[257:263] == b"ustar\0" else b""
    name = block[:100].split(b"\0", 1)[0]
    text = (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")
    claimed = override.get("size", str(size))
    if not claimed.isdecimal():
        raise BrokenTar(f"the extended header before offset {position} gives {text} a size of {claimed!r}")
    return override.get("path", text), int(claimed), block[156:157]


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    if kind == b"L":
        return {"path": data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    fields = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or int(length) == 0:
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return fields
