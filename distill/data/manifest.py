"""The manifest of a split: `manifest.json`, what it says and whether that can be right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from distill.data.store import ShardInfo

FORMAT = 2
REMOTE_FORMAT = 3
"""With a URL as root, and each shard's ETag and version; the index is that of `FORMAT`."""
OLD_FORMAT = 1
"""Without height and width in the index; `shards/renew.py` adds them."""
MANIFEST = "manifest.json"
INDEX = "index.npy"


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of a split of any format, by its keys; `format` is one of them. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; make it with `python shards/prepare.py SOURCE ... --out DIR`")
    try:
        return parse_manifest(str(folder), (folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = (
            f"its splits are {', '.join(splits)}: name one of them, as {folder / splits[0]}"
            if splits
            else "prepare it, or let an unfinished preparation finish, with `python shards/prepare.py`"
        )
        raise ValueError(f"{folder}: no {MANIFEST} in it, so this is no finished split; {hint}") from error


def parse_manifest(place: str, content: bytes) -> Mapping[str, Any]:
    """The manifest of the split at `place` from its bytes. Raises ValueError for any others."""
    try:
        manifest = json.loads(content)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{place}/{MANIFEST}: not readable as JSON ({error}); prepare the split again") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{place}/{MANIFEST}: damaged (no format in it); prepare the split again")
    return manifest


def check_shard(place: str, shard: ShardInfo) -> None:
    """Raises ValueError for a shard outside of the manifest's root, TypeError for one whose name and tags are no text."""
    name = PurePosixPath(shard.name)
    if not all(isinstance(text, str) for text in (shard.sha256, shard.etag, shard.version)):
        raise TypeError(f"shard {shard.name}: sha256, etag or version is no text")
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(
            f"{place}/{MANIFEST}: names the shard {shard.name}, which lies outside of its root; prepare the split again"
        )


def check_format(folder: str, found: object) -> None:
    """Raises ValueError, with the remedy, for a format that this version does not read."""
    if found == OLD_FORMAT:
        raise ValueError(
            f"{folder}: prepared by an earlier version, its index has no image sizes; run "
            f"`python shards/prepare.py renew {folder}`, which writes them into the index and keeps the shards"
        )
    if found not in (FORMAT, REMOTE_FORMAT):
        raise ValueError(
            f"{folder}/{MANIFEST}: format {found}, this version reads {FORMAT} and {REMOTE_FORMAT}; prepare the split again"
        )
