"""The files of a split's shards on this node, wherever the shards live.

Training reads local files. `LocalStore` has them in a folder. `CachedStore` (`remote/cached_store.py`) fetches them from a
remote store, whole, into a cache that all processes of the node share. Correctness never depends on it: each sample's checksum
is compared when it is read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from distill.data.stream import Position

logger = logging.getLogger("distill.data")


class ShardLost(OSError):
    """A shard cannot be read any more; the text names it."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard, as the manifest describes it."""

    name: str
    samples: int
    bytes: int
    sha256: str
    etag: str = ""
    """The remote store's, here and below; empty for a local shard."""
    version: str = ""


class ShardStore(Protocol):
    """The shards of a split as files of this node."""

    checks_arrivals: bool
    """Whether samples of each shard are compared when it comes to this node."""

    def check(self) -> None:
        """Compares what is known of every shard without reading it with the manifest. Raises ValueError, with the remedy."""
        ...

    def path(self, shard: int) -> Path:
        """The file in which the shard lies, or will lie when it is opened."""
        ...

    def where(self, shard: int) -> str:
        """The shard's place in words: its file, or its URL."""
        ...

    def open(self, shard: int) -> int:
        """A descriptor of the shard's file, to read. Raises ShardLost."""
        ...

    def reached(self, position: Position) -> Iterable[int]:
        """Notes how far this process reads; gives the shards whose files it should close, to free their space."""
        ...

    def renewed(self, shard: int, descriptor: int) -> bool:
        """Told that a sample of the opened file is damaged: whether the shard was fetched anew, so that it is worth reading
        again. Raises ShardLost."""
        ...

    def waiting(self) -> str:
        """The shards that this process waits for, in words; empty where it waits for none."""
        ...

    def close(self) -> None:
        """Ends what goes on in the background; calling it twice is harmless."""
        ...


class LocalStore:
    """Shards in a folder, which are only read."""

    checks_arrivals = False

    def __init__(self, root: Path, shards: Sequence[ShardInfo], place: str) -> None:
        """root: the folder of the shards. place: the split, for people."""
        self._paths = [root / shard.name for shard in shards]
        self._shards = shards
        self._place = place

    def check(self) -> None:
        """Compares the size of every file. Raises ValueError."""
        for path, shard in zip(self._paths, self._shards, strict=True):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ValueError(
                    f"{path}: shard is missing ({error.strerror}); copy it again, or remove {self._place} and prepare it again"
                ) from error
            if size != shard.bytes:
                raise ValueError(
                    f"{path}: shard has {size} bytes, the manifest says {shard.bytes}; "
                    f"copy it again, or remove {self._place} and prepare it again"
                )

    def path(self, shard: int) -> Path:
        """The shard's file."""
        return self._paths[shard]

    def where(self, shard: int) -> str:
        """The path of the shard's file."""
        return str(self._paths[shard])

    def open(self, shard: int) -> int:
        """A descriptor of the shard's file. Raises ShardLost."""
        try:
            return os.open(self._paths[shard], os.O_RDONLY)
        except OSError as error:
            raise ShardLost(
                f"{self._paths[shard]}: cannot be read any more ({error.strerror}); restore the shard and resume"
            ) from error

    def reached(self, position: Position) -> Iterable[int]:
        """No shard: nobody wants the space of a local one."""
        return ()

    def renewed(self, shard: int, descriptor: int) -> bool:
        """False: there is no other copy."""
        return False

    def waiting(self) -> str:
        """Nothing: local shards are there."""
        return ""

    def close(self) -> None:
        """Nothing: no work goes on."""
