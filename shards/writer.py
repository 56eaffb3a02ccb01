"""One shard from its job, and one split from its shards: deterministic bytes, and nothing half-written looks finished.

Order of a shard: tar written aside, synced, renamed; index rows; marker last. Order of a split: index, quarantine,
manifest last, then the parts folder goes. Started again, a preparation makes only the shards without a marker.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distill.data.index import RECORD, TAR_BLOCK, ShardInfo, write_split
from distill.files import ASIDE, write_atomically, written_aside
from shards.images import Unclean, clean_image
from shards.jobs import PARTS, Job, ShardJob, ShardResult, read_marker, rows_path, shard_path, write_marker

QUARANTINE = "quarantine.jsonl"
NOTES = "notes.jsonl"


class TarWriter:
    """Writes USTAR members with time 0 and tells where each one's content lies; keeps the sha256 of what it wrote."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha = hashlib.sha256()
        self.position = 0

    def add(self, name: str, data: bytes) -> int:
        """Adds a member; the offset of its content."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        offset = self.position + TAR_BLOCK
        # in one piece: a call to the system for each of the three takes twice as long
        self._write(b"".join((info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % TAR_BLOCK))))
        return offset

    def finish(self) -> str:
        """Writes the end of the archive; the sha256 of the whole."""
        self._write(b"\0" * (2 * TAR_BLOCK))
        self._write(b"\0" * (-self.position % tarfile.RECORDSIZE))
        return self._sha.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha.update(data)
        self.position += len(data)


def write_shard(job: ShardJob) -> ShardResult:
    """Makes the shard unless its marker says that it is there; its marker's content.

    Raises OSError (unreadable source, full disk) and SourceChanged; the shard then does not exist.
    """
    folder = Path(job.folder)
    done = read_marker(job)
    if done is not None:
        return done
    # the workers of a killed preparation end half a second after it, and the next one may be at this shard already
    with written_aside(folder / job.name, writer=f".{os.getpid()}") as aside, aside.open("wb") as file:
        records, result = _fill(job, TarWriter(file))
    write_marker(job, result, records)
    return result


def _fill(job: ShardJob, writer: TarWriter) -> tuple[NDArray[np.void], ShardResult]:
    rows: list[tuple[int, ...]] = []
    quarantine: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    read_bytes = 0
    for item in job.items:
        data = item.ref.read()
        read_bytes += len(data)
        told = {"key": item.key, "source": item.ref.name(), "label": item.label}
        try:
            image = clean_image(data, job.resize_short, job.quality)
        except Unclean as error:
            quarantine.append({**told, "reason": str(error)})
            continue
        writer.add(f"{item.key}.cls", str(item.label).encode())
        offset = writer.add(f"{item.key}.{image.extension}", image.data)
        rows.append((offset, job.number, len(image.data), item.label, zlib.crc32(image.data), *image.size))
        notes.extend({**told, "note": note} for note in image.notes)
    sha = writer.finish()
    shard = ShardInfo(job.name, len(rows), writer.position, sha)
    return np.array(rows, RECORD), ShardResult(job.number, shard, read_bytes, len(job.items), quarantine, notes)


def write_reports(
    folder: Path, results: Sequence[ShardResult], refused: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Writes quarantine and notes of a split, and gives both; `refused` was so before its shards were made."""
    quarantine = [*refused, *(line for result in results for line in result.quarantine)]
    notes: list[Mapping[str, Any]] = [line for result in results for line in result.notes]
    write_atomically(folder / QUARANTINE, _lines(quarantine))
    write_atomically(folder / NOTES, _lines(notes))
    return quarantine, notes


def read_records(folder: Path, results: Sequence[ShardResult]) -> NDArray[np.void]:
    """The index rows of finished shards, in the order of `results`."""
    return np.concatenate([np.frombuffer(rows_path(folder, result.number).read_bytes(), RECORD) for result in results])


def finish_split(
    folder: Path,
    results: Sequence[ShardResult],
    records: NDArray[np.void],
    class_names: Sequence[str],
    extra: dict[str, Any],
    root: str = ".",
) -> None:
    """Writes index and, last, the manifest of a split whose shards are all made."""
    write_split(folder, [result.shard for result in results], records, class_names, root=root, extra=extra)
    tidy(folder)


def discard(folder: Path, jobs: Iterable[Job]) -> None:
    """Removes what was made of a split that keeps nothing, so that another request can be made for the same folder."""
    for job in jobs:
        if isinstance(job, ShardJob):
            shard_path(job).unlink(missing_ok=True)
    tidy(folder)


def tidy(folder: Path) -> None:
    """Removes what only an unfinished split needs: a preparation may be killed between its last file and this."""
    for leftover in folder.glob(f".*{ASIDE}"):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _lines(entries: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode(errors="backslashreplace")
