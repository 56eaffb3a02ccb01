"""What several rooms do with the disk: names of a run's files, files that are whole or absent, held folders, checksums."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

RUN_MANIFEST, RUN_SUMMARY = "manifest.json", "summary.json"
"""In a run's folder: what made the run; its results, which are there when it is whole."""
RUN_METRICS, RUN_EVENTS = "metrics.jsonl", "events.jsonl"
"""In a run's folder: its log; what happened to it from outside."""
LOCK = ".lock"
ASIDE = ".aside"
IN_PLACE = {
    b"version https://git-lfs": "a pointer of Git LFS, whose file `git lfs pull` fetches",
    b"<": "a web page",
    b"\x1f\x8b": "compressed with gzip",
}
"""The first bytes of what often lies in the place of a file that was fetched."""


@contextmanager
def written_aside(path: Path, writer: str = "") -> Iterator[Path]:
    """A path beside `path` to write to; what was written there becomes `path` when the block ends without an error.

    Whenever the machine stops, `path` has its old content or the new one. `writer` tells writers of one path apart; without
    it a folder has one writer at a time, and what a kill leaves is overwritten by the next write.
    """
    aside = path.with_name(f".{path.name}{writer}{ASIDE}")
    try:
        yield aside
        # 1. the content is on the disk, 2. the name is its name, 3. that is on the disk: a name that came before its content
        # would be an empty file after a power cut
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes `content` to `path` as `written_aside` does."""
    with written_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def what_starts(start: bytes) -> str:
    """What a file of the wrong kind is, by its first bytes, for people."""
    return next((name for magic, name in IN_PLACE.items() if start.lstrip().startswith(magic)), f"starts with {start[:8]!r}")


def locked(folder: Path, wait_seconds: float = 0.0) -> IO[str]:
    """An open file that holds `folder` for this process until it is closed, or the process ends in whatever way.

    Makes the folder. Raises BlockingIOError where another process holds it, and goes on to after `wait_seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("w")
    end = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                raise
            time.sleep(0.2)
        else:
            return file


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def json_bytes(value: object) -> bytes:
    """Readable JSON whose bytes depend on the value alone; the bytes of a file name that is no UTF-8 are escaped."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
