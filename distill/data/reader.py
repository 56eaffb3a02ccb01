"""The encoded bytes of a sample at (shard, offset, size), checked cheaply before a decoder sees them."""

from __future__ import annotations

import os
import resource
import threading
import zlib

import numpy as np
from numpy.typing import NDArray

from distill.data.index import ShardIndex
from distill.data.store import ShardLost
from distill.data.stream import Position

JPEG_MAGIC = b"\xff\xd8\xff"
END_OF_IMAGE = b"\xff\xd9"
TAIL = 64 * 1024
"""Bytes at the end of a JPEG in which its end marker must lie; what follows the marker is legal trailing junk."""


class BadSample(ValueError):
    """The bytes of one sample are not what the index promises, or not an image; the text is the reason."""


def check_bytes(data: bytes, crc32: int) -> None:
    """Raises BadSample where the bytes are not those of the index, or plainly no whole image; some 30 us for 100 KB."""
    if not data:
        raise BadSample("zero bytes")
    if (found := zlib.crc32(data)) != crc32:
        raise BadSample(f"checksum {found:08x}, the index says {crc32:08x}: the bytes changed on disk")
    if data.startswith(JPEG_MAGIC) and data.rfind(END_OF_IMAGE, -TAIL) < 0:
        raise BadSample("truncated JPEG: no end marker")


def files_allowed(shards: int) -> int:
    """Number of shards, out of so many, that may stay open. The system's limit, often 1,024 files, is raised where it can be.

    ImageNet-1k has 1,025 shards, and a shuffled epoch reads them all at once. Where the limit is hard, a quarter of it: the
    other split's reader, sockets and libraries want theirs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or shards <= soft // 4:
        return shards
    if hard == resource.RLIM_INFINITY or soft + shards <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft + shards, hard))
        return shards
    return soft // 4


class _OpenFile:
    """A descriptor that is closed when the last one who reads it lets it go: a file that is evicted may be read just then."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class SampleReader:
    """Reads samples of one split with pread, so any number of threads may share it. `close` releases the files.

    mmap would be killed by SIGBUS where a file shrinks under it; pread returns short and can say so.
    """

    def __init__(self, index: ShardIndex) -> None:
        self._store = index.store
        self._records = np.asarray(index.records)  # a view of the same memory; np.memmap's own indexing is ten times as slow
        self._files: dict[int, _OpenFile] = {}
        self._most = files_allowed(len(index.shards))
        self._lock = threading.Lock()

    def read(self, sample: int) -> np.ndarray:
        """The sample's encoded image, uint8 [size].

        Raises BadSample where the bytes are wrong (checksum, no end marker in a JPEG), and ShardLost where its shard is
        gone or shorter than the index says.
        """
        offset, shard, size, _, crc32, *_ = self._records.item(sample)
        file = self._opened(shard)
        try:
            data = self._pread(file, shard, size, offset)
            check_bytes(data, crc32)
        except (BadSample, ShardLost):
            if not self._store.renewed(shard, file.descriptor):
                raise
            self._files.pop(shard, None)
            data = self._pread(self._opened(shard), shard, size, offset)
            check_bytes(data, crc32)
        return np.frombuffer(data, np.uint8)

    def reached(self, position: Position) -> None:
        """Tells the store how far reading is; closes the files whose space it wants back."""
        for shard in self._store.reached(position):
            self._files.pop(shard, None)

    def announce(self, samples: NDArray[np.int64]) -> None:
        """Has the system fetch samples that will be read soon: the disk gets all requests at once, in its own order.

        Costs some microseconds a sample where they are in memory already. Raises ShardLost where a shard is gone.
        """
        for offset, shard, size, *_ in self._records[np.sort(samples)].tolist():
            file = self._opened(shard)  # held while it is used: one that is not kept open is closed when it is let go
            os.posix_fadvise(file.descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def _pread(self, file: _OpenFile, shard: int, size: int, offset: int) -> bytes:
        try:
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise ShardLost(
                f"{self._store.where(shard)}: cannot be read any more ({error.strerror}); restore the shard and resume"
            ) from error
        if len(data) != size:
            raise ShardLost(
                f"{self._store.where(shard)}: {size} bytes at offset {offset} asked for, {len(data)} there: "
                "the shard was truncated after the start; restore it and resume"
            )
        return data

    def _opened(self, shard: int) -> _OpenFile:
        file = self._files.get(shard)
        if file is None:
            # outside of the lock: it may take a download, while other threads read what is there
            file = _OpenFile(self._store.open(shard))
            # samples are read in shuffled order: what lies behind one is not wanted next
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            with self._lock:
                if len(self._files) < self._most:
                    file = self._files.setdefault(shard, file)
        return file

    def close(self) -> None:
        """Closes the files; calling it twice is harmless."""
        with self._lock:
            self._files.clear()
