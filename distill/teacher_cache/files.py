"""The files of a cache: `manifest.json`, a `view-0000.npy` for each view, `done/` with a marker for each unit, `absent.jsonl`.

A unit is a run of rows of one view that one process computes. Its marker comes after its bytes are on the disk, the manifest
after all markers: whatever is killed when, a cache is whole or says that it is not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import Failed
from distill.files import file_sha256, json_bytes
from distill.teacher_cache.codecs import Codec, codec_of

FORMAT = 1
MANIFEST = "manifest.json"
REQUEST = "request.json"
"""What is being made, while it is: the facts of the manifest to come."""
ABSENT = "absent.jsonl"
DONE = "done"
NOT_COMPARED = ("made_with",)
"""Facts for people: the spot check finds what matters of them."""


class CacheError(Failed):
    """A cache whose rows are not what they should be; the text has the numbers and the remedy."""


def view_path(folder: Path, view: int) -> Path:
    """The file of a view."""
    return folder / f"view-{view:04d}.npy"


class TeacherCache:
    """A finished cache, for reading: a `TeacherRows` of the data room. Made by `TeacherCache.open`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], used: int = 0) -> None:
        """used: the number of views, from the first on, by which the cache is known; 0 for all."""
        self.folder, self.facts = folder, manifest
        self.codec: Codec = codec_of(manifest["codec"])
        self.views = len(manifest["views"])
        self.absent = _absent(folder / ABSENT, used or self.views)
        """Samples of which a view that is used has no row, sorted."""
        name = " ".join(str(manifest["codec"][key]) for key in ("name", "dtype", "k") if key in manifest["codec"])
        # by its rows: a cache that was copied, finished in several goes or given more views since is the same
        shas = [view["sha256"] for view in manifest["views"]]
        digest = json_bytes([shas[:used] if used else shas, manifest["codec"]])
        self.identity = {"teacher_cache": f"{name}, {_short(digest)}"}
        self._first_row = len(npy_header(self.codec.row, manifest["num_samples"]))
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], used: int = 0) -> TeacherCache:
        """The cache in `folder`, after the size of every view was looked at; `used` as in the constructor.

        Raises ValueError, with the remedy, where there is none, where it is not finished, and where files are not whole.
        """
        path = Path(folder)
        manifest = read_json(path / MANIFEST)
        if manifest is None and (path / REQUEST).is_file():
            raise ValueError(f"{path}: this cache is not finished; run the same command of pipelines/cache_teacher.py again")
        if manifest is None:
            raise ValueError(f"{path}: no teacher cache in it; make one with pipelines/cache_teacher.py --out {path}")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path}: a cache of format {manifest.get('format')}, this version reads {FORMAT}; make it again")
        try:
            sizes = {view: (size_of(view_path(path, view)), entry["bytes"]) for view, entry in enumerate(manifest["views"])}
            cache = cls(path, manifest, used)
        except (KeyError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path / MANIFEST}: damaged ({said}); make the cache again in another folder") from error
        if short := {view: pair for view, pair in sizes.items() if pair[0] != pair[1]}:
            said = ", ".join(f"{view_path(path, view).name} has {a:,} bytes of {b:,}" for view, (a, b) in short.items())
            raise ValueError(f"{path}: {said}; {remedy(path, list(short))}")
        return cache

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's row."""
        return self.codec.row.itemsize

    def read(self, view: int, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [B, bytes]: the rows of these samples; any number of threads may ask. Raises CacheError for one that is not
        whole.

        By pread, as samples are read: a map would hold the interpreter's lock while a disk seeks, and end the process where the
        file has shrunk.
        """
        data, file = np.empty((len(samples), self.row_bytes), np.uint8), self._opened(view)
        places = (self._first_row + samples * self.row_bytes).tolist()
        for place in places:  # the disk gets all requests at once
            os.posix_fadvise(file, place, self.row_bytes, os.POSIX_FADV_WILLNEED)
        for row, place in zip(data, places, strict=True):
            if os.preadv(file, [row.data], place) != self.row_bytes:
                raise CacheError(f"{view_path(self.folder, view)}: cut short since the start; {remedy(self.folder, [view])}")
        whole = self.codec.whole(data.view(self.codec.row)[:, 0])
        if not whole.all():
            sample = int(samples[int(whole.argmin())])
            raise CacheError(
                f"{view_path(self.folder, view)}: the row of sample {sample} in view {view} is not whole: it is damaged, or"
                f" the sample could not be read when the cache was made; `--verify` says which; {remedy(self.folder, [view])}"
            )
        return data

    def _opened(self, view: int) -> int:
        """The view's descriptor; it stays open, for epochs come back to it."""
        with self._lock:
            if view not in self._files:
                self._files[view] = os.open(view_path(self.folder, view), os.O_RDONLY)
            return self._files[view]

    def damaged(self, view: int) -> bool:
        """Whether the content of a view's file is not what the manifest says; reads all of it."""
        wanted: str = self.facts["views"][view]["sha256"]
        return file_sha256(view_path(self.folder, view)) != wanted


def remedy(folder: Path, views: Sequence[int]) -> str:
    """The command that makes damaged views again."""
    markers = " ".join(str(folder / DONE / f"{view:04d}-*") for view in views)
    return f"`rm {markers}`, then the same command of pipelines/cache_teacher.py again, makes it anew"


def differences(there: Mapping[str, Any], here: Mapping[str, Any], where: str = "") -> list[str]:
    """A line for each fact of `here` that is another one in a cache's manifest, with both values."""
    found = []
    for key, value in here.items():
        if key in NOT_COMPARED:
            continue
        other = there.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found += differences(other, value, f"{where}{key}.")
        elif json.loads(json.dumps(value)) != other:  # tuples are lists in a manifest
            found.append(f"{where}{key}: {other!r} in the cache, {value!r} asked")
    return found


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _absent(path: Path, used: int) -> list[int]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line["sample"] for line in lines if min(line["views"]) < used]
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = "remove it, and the same command of pipelines/cache_teacher.py writes it anew"
        raise ValueError(f"{path}: cannot be read ({error}); {again}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping that a file holds; None where there is no file. Raises ValueError for any other content."""
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); make the cache again in another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged: holds a {type(found).__name__}; make the cache again in another folder")
    return found


def npy_header(row: np.dtype, count: int) -> bytes:
    """The header of an array of rows, as NumPy writes it."""
    file = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()
