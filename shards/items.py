"""What a source is made of before anything is read: splits of labelled items, each with a way to get its bytes."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

KEY_LENGTH = 90
"""A USTAR name has 100 bytes; the longest of our extensions, `.jpeg`, and a counter must fit behind the key."""


class SourceChanged(RuntimeError):
    """A source file is not what it was when the preparation was planned."""


class Ref(Protocol):
    """A way to get the bytes of one image; it travels to worker processes and machines."""

    def read(self) -> bytes:
        """The encoded image. Raises OSError, and SourceChanged where the source is not what it was when it was listed."""
        ...

    def name(self) -> str:
        """The image's name for reports."""
        ...

    def fingerprint(self) -> bytes:
        """What is known of the content when the source is listed: its size, or the content itself where it is in memory."""
        ...

    def stamp(self) -> tuple[str, int] | None:
        """Path and time of the file that is read, in ns; None where there is none."""
        ...


class FileRef(NamedTuple):
    """A whole file, as it was when it was listed."""

    path: str
    size: int
    mtime_ns: int

    def read(self) -> bytes:
        """The file's bytes; raises OSError, or SourceChanged where size or time differ from the listing."""
        path = Path(self.path)
        try:
            data = path.read_bytes()
        except OSError as error:  # that of a failing disk does not say which file it was
            raise OSError(error.errno, error.strerror, self.path) from error
        stat = path.stat()
        if (len(data), stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise SourceChanged(
                f"{self.path}: changed while it was prepared ({len(data)} bytes, {self.size} when listed); start again"
            )
        return data

    def name(self) -> str:
        """The file's path."""
        return self.path

    def fingerprint(self) -> bytes:
        """The size."""
        return str(self.size).encode()

    def stamp(self) -> tuple[str, int]:
        """The file and its time."""
        return self.path, self.mtime_ns


class RangeRef(NamedTuple):
    """A part of a file: a member of an archive that is read without extracting it."""

    path: str
    offset: int
    size: int
    member: str
    mtime_ns: int
    """Time of the file when it was listed."""

    def read(self) -> bytes:
        """The part's bytes; raises OSError, or SourceChanged where the archive became shorter or was written to."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            try:
                data = file.read(self.size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, self.path) from error
            changed = os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns
        if len(data) != self.size:
            raise SourceChanged(f"{self.path}: ends inside of {self.member}; the archive is truncated, fetch it again")
        if changed:
            raise SourceChanged(f"{self.path}: changed while it was prepared; start again")
        return data

    def name(self) -> str:
        """The file's path and the member's name."""
        return f"{self.path}:{self.member}"

    def fingerprint(self) -> bytes:
        """The size of the part."""
        return str(self.size).encode()

    def stamp(self) -> tuple[str, int]:
        """The file and its time."""
        return self.path, self.mtime_ns


class PixelsRef(NamedTuple):
    """Pixels that are not an image file yet: uint8 RGB, row by row, to be encoded as `kind` (`PNG` or `JPEG`)."""

    pixels: bytes
    height: int
    width: int
    kind: str
    label: str

    def read(self) -> bytes:
        """The encoded image. JPEG with quality 95 and full chroma."""
        array = np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, 3)
        encoded = io.BytesIO()
        options = {"quality": 95, "subsampling": 0} if self.kind == "JPEG" else {}
        Image.fromarray(array).save(encoded, self.kind, **options)
        return encoded.getvalue()

    def name(self) -> str:
        """The label."""
        return self.label

    def fingerprint(self) -> bytes:
        """The pixels."""
        return self.pixels

    def stamp(self) -> None:
        """None: no file is read."""
        return None


class BytesRef(NamedTuple):
    """An image file that is already in memory: out of a compressed archive."""

    data: bytes
    label: str

    def read(self) -> bytes:
        """The bytes."""
        return self.data

    def name(self) -> str:
        """The label."""
        return self.label

    def fingerprint(self) -> bytes:
        """The bytes."""
        return self.data

    def stamp(self) -> None:
        """None: no file is read any more."""
        return None


class Item(NamedTuple):
    """One sample to be: its key in the shards, its class, its bytes."""

    key: str
    label: int
    ref: Ref


@dataclass(frozen=True)
class Split:
    """One split of a source. `class_names` is the same for all splits of a source: sorted names of the training split."""

    class_names: tuple[str, ...]
    items: Sequence[Item]
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Files that are passed over: what they are, and how many."""
    refused: Sequence[Mapping[str, str]] = ()
    """Images that cannot be read at all, such as links to nothing: key, source and reason of each."""

    def digest(self) -> str:
        """Hex sha256 of what is to be prepared: keys, labels, sizes and names, not the files' times."""
        sha = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        for item in self.items:
            sha.update(f"\n{item.key} {item.label} ".encode() + item.ref.fingerprint())
        return sha.hexdigest()

    def stamp(self) -> str:
        """Hex sha256 of the times of the source files, each once: tells a source that was touched since."""
        times = dict(stamp for item in self.items if (stamp := item.ref.stamp()) is not None)
        return hashlib.sha256(b"".join(time.to_bytes(8, "little", signed=True) for time in times.values())).hexdigest()


@dataclass(frozen=True)
class Source:
    """The input of `prepare`: splits by name, and where they come from, for the manifest."""

    kind: str
    splits: dict[str, Split]
    origin: dict[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    """Lines for people: what was understood of the source, where it could be understood in another way."""


def clean_key(text: str) -> str:
    """A key that every WebDataset reader takes: letters, digits, `_`, `-`; at most `KEY_LENGTH` of them."""
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "sample"
    if len(key) > KEY_LENGTH:
        key = f"{key[: KEY_LENGTH - 13]}-{hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()[:12]}"
    return key


def unique_keys(texts: Iterable[str]) -> list[str]:
    """`clean_key` of each text, with `-2`, `-3`, ... behind a key that came before."""
    seen: set[str] = set()
    last: dict[str, int] = {}  # names in other scripts have few different keys: not counted up from 2 each time
    keys = []
    for text in texts:
        base = key = clean_key(text)
        number = last.get(base, 1)
        while key in seen:
            number += 1
            key = f"{base}-{number}"
        last[base] = number
        seen.add(key)
        keys.append(key)
    return keys
