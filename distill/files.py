"""Files that are whole or absent: written aside, then renamed; and checksums of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_text_atomically(path: Path, text: str) -> None:
    """`text` at `path`: the old content or the new one, whenever the machine stops."""
    aside = path.with_name(f".{path.name}.aside")  # one name: what a kill leaves is overwritten by the next write
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes aside, syncs, renames: after a crash `path` has its old content or the new one, never a part.

    One name aside, so that what a crash leaves is overwritten: a folder has one writer at a time.
    """
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


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


def replace_file(path: Path, write: Any) -> None:
    """Writes beside `path` and renames, so that a reader never meets half a file."""
    aside = path.with_name(f".{path.name}.partial")
    write(aside)
    os.replace(aside, path)
