"""The folder of a node's cache: where it lies by default, which disks cannot carry it, how its room is shared out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

NETWORK = re.compile(
    r"nfs\d?|lustre|cifs|smb\d?|smbfs|ceph|gpfs|beegfs|9p|afs|glusterfs|gfs2|ocfs2|orangefs|panfs|wekafs"
    r"|fuse\.(?:sshfs|glusterfs|s3fs|gcsfuse|blobfuse2?|rclone|goofys|mount-s3|juicefs|ceph.*|.*nfs.*)"
)
"""File systems of the kernel's table that several machines share."""
MOUNTS = Path("/proc/self/mountinfo")
KEPT_FREE = 0.02
"""Share of the disk that is left alone where no limit is given."""


class Room(NamedTuple):
    """The room that a split wants in the cache, in bytes."""

    least: int
    """Below it shards would be fetched more than once an epoch."""
    everything: int
    """All that an epoch needs: with it each shard is fetched once a run."""


def cache_folder(asked: str = "") -> Path:
    """The cache's folder: the one asked for, or `distill` in the user's own folder of caches."""
    return Path(asked or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "distill").expanduser()


def check_cache(folder: Path) -> None:
    """Makes the folder. Raises ValueError where it cannot be written, or lies on a disk that several machines share.

    On those flock may lock nothing, or only one machine, and a file that is open may be gone when it is unlinked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {folder} cannot be made ({error.strerror}); give a folder on a local disk"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"data.cache_dir: {folder} cannot be written; give a folder of your own on a local disk")
    kind = file_system(folder, MOUNTS.read_text() if MOUNTS.exists() else "")
    if NETWORK.fullmatch(kind):
        raise ValueError(
            f"data.cache_dir: {folder} lies on a network file system ({kind}), whose locks and deleted files do not do what the"
            " cache needs; give a folder on a disk of this machine"
        )


def file_system(folder: Path, mounts: str) -> str:
    """The kind of the file system that holds a folder, by the text of /proc/self/mountinfo; empty where it does not say."""
    place, best, kind = folder.resolve(), -1, ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        mount = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), fields.split()[4]))  # \040 is a space
        if place.is_relative_to(mount) and len(mount.parts) >= best:  # of two on one place the later hides the other
            best, kind = len(mount.parts), rest.split()[0]
    return kind


def share_room(limit: int, wanted: dict[str, Room], remedy: str) -> dict[str, int]:
    """Bytes of the cache for each split: all that it needs where that fits, else its least and what is left, last splits first.

    Raises ValueError, with the least limit, where even that does not fit.
    """
    least = sum(room.least for room in wanted.values())
    if limit < least:
        parts = ", ".join(f"{room.least / 1e9:.3g} GB for {name}" for name, room in wanted.items())
        raise ValueError(
            f"room in the cache: {limit / 1e9:.3g} GB, but this order of samples on these processes needs {_up(least)} GB"
            f" at a time ({parts}); {remedy}"
        )
    shares, left = {name: room.least for name, room in wanted.items()}, limit - least
    for name, room in reversed(
        wanted.items()
    ):  # a small validation split is kept whole before the training split gets the rest
        shares[name] += (more := min(left, room.everything - room.least))
        left -= more
    return shares


def _up(count: int) -> str:
    """Gigabytes, rounded up: what is printed is enough when it is given."""
    return f"{-(-count // 1_000_000) / 1000:g}"
