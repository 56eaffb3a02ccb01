"""Making a cache: its units and batches, and the folder while it is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.files import json_bytes, write_atomically
from distill.teacher_cache.codecs import Codec, codec_of
from distill.teacher_cache.files import (
    ABSENT,
    DONE,
    MANIFEST,
    REQUEST,
    CacheError,
    differences,
    npy_header,
    read_json,
    size_of,
    view_path,
)

CHUNK = 1 << 22
"""Bytes that are hashed at a time."""


@dataclass(frozen=True)
class Unit:
    """Rows `first` to `last`, not included, of a view."""

    view: int
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """The name of its marker."""
        return f"{self.view:04d}-{self.number:04d}"


@dataclass(frozen=True)
class Division:
    """The division of a cache into units, and of these into the batches that are computed: the same for any number of
    processes, so that the same images are always in one batch and the same bytes come out."""

    num_samples: int
    unit: int
    batch: int

    def units(self, views: int) -> Iterator[Unit]:
        """All units, view by view, in the order of the shards."""
        for view in range(views):
            for number, first in enumerate(range(0, self.num_samples, self.unit)):
                yield Unit(view, number, first, min(self.num_samples, first + self.unit))


class Entries(Sequence[tuple[int, NDArray[np.int64]]]):
    """The batches of some units, (view, samples) each, computed as they are asked for: there may be millions."""

    def __init__(self, units: Sequence[Unit], batch: int) -> None:
        self._units, self._batch = units, batch
        self._ends = np.cumsum([-(-(unit.last - unit.first) // batch) for unit in units])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: Any) -> Any:
        place = int(np.searchsorted(self._ends, number, side="right"))
        unit, before = self._units[place], int(self._ends[place - 1]) if place else 0
        first = unit.first + (number - before) * self._batch
        return unit.view, np.arange(first, min(unit.last, first + self._batch), dtype=np.int64)


class Writer:
    """The folder of a cache that is being made, by one launch at a time (the caller holds its lock)."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self.codec: Codec = codec_of(self.facts["codec"])
        self.division = Division(self.facts["num_samples"], self.facts["unit"], self.facts["batch"])
        self._header = npy_header(self.codec.row, self.division.num_samples)

    @property
    def view_bytes(self) -> int:
        """Bytes of one view's file."""
        return len(self._header) + self.division.num_samples * self.codec.row.itemsize

    def begin(self, views: int) -> int:
        """The views that the cache will have: as many as asked, or as a finished one has already. Notes what is being made; the
        views of a cache that is whole can be read meanwhile.

        Raises ValueError, with every difference, where the folder holds another cache, and CacheError as `allocate` does.
        """
        manifest = read_json(self.folder / MANIFEST)
        (self.folder / DONE).mkdir(parents=True, exist_ok=True)
        begun, made = (self.folder / REQUEST).is_file(), bool(os.listdir(self.folder / DONE))
        if manifest is None and not begun and (made or any(self.folder.glob("view-*.npy"))):
            raise ValueError(f"{self.folder} holds files of a cache of which nothing says what it is; give another --out")
        if manifest is None and begun and not made:  # it may be another one now
            for file in (self.folder / REQUEST, *self.folder.glob("view-*.npy")):
                file.unlink(missing_ok=True)
        found = read_json(self.folder / REQUEST) or manifest
        if found is not None and (changed := differences(found, self.facts)):
            lines = "\n  ".join(changed)
            raise ValueError(f"{self.folder} holds another cache; give another --out, or ask for the same\n  {lines}")
        there = 0 if manifest is None else len(manifest["views"])
        views = max(views, there)
        if not self.whole(views):
            self.check_space(views)
            write_atomically(self.folder / REQUEST, json_bytes({**(found or self.facts), "views": views}))
        if self.missing(there):  # until they are made again it is not whole; views that are added leave it so
            (self.folder / MANIFEST).unlink(missing_ok=True)
        return views

    def whole(self, views: int) -> bool:
        """Whether the cache is finished with so many views."""
        manifest = read_json(self.folder / MANIFEST)
        there = manifest is not None and len(manifest["views"]) == views and not (self.folder / REQUEST).exists()
        return there and (self.folder / ABSENT).is_file() and not self.missing(views)

    def missing(self, views: int) -> list[Unit]:
        """The units without a marker, and those that the file of their view does not reach."""
        done = set(os.listdir(self.folder / DONE))
        sizes = [size_of(view_path(self.folder, view)) for view in range(views)]
        return [u for u in self.division.units(views) if u.name not in done or sizes[u.view] < self._place(u.last)]

    def allocate(self, views: int) -> None:
        """Takes the disk space of all views, so that no disk is full hours later. Rows that are there already stay.

        Raises CacheError, with both numbers, where there is not enough; what was taken for that is given back.
        """
        made: list[Path] = []
        try:
            for view in range(views):
                path = view_path(self.folder, view)
                made += [] if path.exists() else [path]
                with _opened(path) as descriptor:
                    os.posix_fallocate(descriptor, 0, self.view_bytes)
                    os.pwrite(descriptor, self._header, 0)
        except OSError as error:
            for path in made:
                path.unlink(missing_ok=True)
            raise self._full(views, error.strerror) from None

    def check_space(self, views: int) -> None:
        """Raises CacheError where the disk has not the bytes of the views that are not there yet."""
        if self._needed(views) > shutil.disk_usage(self.folder).free:
            raise self._full(views, "no space left")

    def _needed(self, views: int) -> int:
        there = sum(min(self.view_bytes, size_of(path)) for path in self.folder.glob("view-*.npy"))
        return max(0, views * self.view_bytes - there)

    def _full(self, views: int, reason: str | None) -> CacheError:
        needed, free = self._needed(views), shutil.disk_usage(self.folder).free
        return CacheError(
            f"{self.folder}: {views} views need {needed:,} bytes more, the disk has {free:,} free ({reason}); ask for fewer,"
            " or take another disk"
        )

    def write(self, unit: Unit, first: int, rows: NDArray[np.void]) -> None:
        """Writes rows `first` and on of a unit's view."""
        with _opened(view_path(self.folder, unit.view)) as descriptor:
            data = memoryview(rows.tobytes())
            place = self._place(first)
            while data:
                written = os.pwrite(descriptor, data, place)
                data, place = data[written:], place + written

    def mark(self, unit: Unit, crc32: int, absent: Sequence[int]) -> None:
        """Says that a unit's rows are on the disk; `absent`: its samples that could not be read."""
        with _opened(view_path(self.folder, unit.view)) as descriptor:
            os.fsync(descriptor)
        marker = {"crc32": f"{crc32:08x}", "absent": list(absent)}
        write_atomically(self.folder / DONE / unit.name, json_bytes(marker))

    def hashed(self, view: int) -> tuple[str, list[Unit]]:
        """The sha256 of a view's file, and those of its units whose rows have other checksums than their markers say."""
        digest, damaged = hashlib.sha256(), []
        with view_path(self.folder, view).open("rb") as file:
            digest.update(file.read(len(self._header)))
            for unit in (each for each in self.division.units(view + 1) if each.view == view):
                crc32, left = 0, self._place(unit.last) - self._place(unit.first)
                while left and (data := file.read(min(left, CHUNK))):
                    digest.update(data)
                    crc32, left = zlib.crc32(data, crc32), left - len(data)
                if f"{crc32:08x}" != json.loads((self.folder / DONE / unit.name).read_text())["crc32"]:
                    damaged.append(unit)
        return digest.hexdigest(), damaged

    def forget(self, units: Sequence[Unit]) -> None:
        """Takes the markers of units away, which are then missing."""
        for unit in units:
            (self.folder / DONE / unit.name).unlink(missing_ok=True)

    def _place(self, row: int) -> int:
        """Where a row begins in its file."""
        return len(self._header) + row * self.codec.row.itemsize

    def finish(self, views: int, sha256: Sequence[str]) -> None:
        """Writes `absent.jsonl`, then the manifest, and takes the note of what is being made away."""
        absent: dict[int, list[int]] = {}
        for unit in self.division.units(views):
            for sample in json.loads((self.folder / DONE / unit.name).read_text())["absent"]:
                absent.setdefault(sample, []).append(unit.view)
        lines = [json.dumps({"sample": sample, "views": absent[sample]}) + "\n" for sample in sorted(absent)]
        write_atomically(self.folder / ABSENT, "".join(lines))
        entries = [{"bytes": self.view_bytes, "sha256": each} for each in sha256]
        request = read_json(self.folder / REQUEST) or self.facts
        write_atomically(self.folder / MANIFEST, json_bytes({**request, "views": entries}))
        (self.folder / REQUEST).unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
