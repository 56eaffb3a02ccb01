"""A prepared split that lies at a URL, or whose shards do: its manifest and index here, the store of its shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.data.manifest import INDEX, MANIFEST, check_format, parse_manifest
from distill.data.remote.cache import check_cache
from distill.data.remote.fetch import FetchError, Remote, read_object
from distill.data.remote.urls import is_url, remote_of
from distill.files import file_sha256, locked, write_atomically

LOCK_SECONDS = 600.0
"""The longest that a process waits for another one of its node that fetches the index, 36 MB of ImageNet."""


def fetched_split(url: str, cache: Path) -> tuple[Path, Mapping[str, Any]]:
    """The folder of the cache in which the index of a remote split lies now, and its manifest."""
    remote = remote_of(url)
    try:
        manifest = parse_manifest(url, read_object(remote, MANIFEST))
        check_format(url, manifest["format"])
        digest = str(manifest.get("index_sha256"))
        if re.fullmatch("[0-9a-f]{64}", digest) is None:  # it becomes the name of a folder
            raise ValueError(f"{url}/{MANIFEST}: damaged (index_sha256 {digest[:80]!r}); prepare the split again")
        folder = cache / digest
        check_cache(folder)
        with locked(folder, wait_seconds=LOCK_SECONDS):  # the processes of a node open the split at the same moment
            if not (folder / INDEX).is_file() or file_sha256(folder / INDEX) != digest:
                write_atomically(folder / INDEX, read_object(remote, INDEX))
    except FetchError as error:
        raise ValueError(f"{error}; --train and --val take the place of a prepared split, which has a {MANIFEST}") from error
    return folder, manifest


def store_of(place: str, manifest: Mapping[str, Any]) -> Remote:
    """The store of the shards of the split at `place`, a folder or a URL, whose shards are remote. Raises ValueError for a root
    that cannot be asked from here."""
    root: str = manifest["root"]
    if root.startswith("pipe:"):
        raise ValueError(f"{place}: its manifest would run the command {root}; give it with --train or --val instead")
    return remote_of(root, manifest.get("store")) if is_url(root) else _below(place, root)


def _below(url: str, root: str) -> Remote:
    """The store of the shards of a split at `url` whose manifest has a relative root. Raises ValueError for another."""
    if Path(root).is_absolute() or ".." in Path(root).parts:
        raise ValueError(
            f"{url}/{MANIFEST}: its shards lie in {root}, a folder of the machine that prepared it; index them where they lie"
            " with `python shards/prepare.py wds --source URL`"
        )
    if root == "." or url.startswith("pipe:"):
        return remote_of(url)
    return remote_of(f"{url.rstrip('/')}/{root}")
