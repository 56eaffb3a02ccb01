"""The shards of a remote store as files of this node: fetched whole into a cache that all its processes share.

Rules of the cache, below `CACHE/DIGEST/` for a split's index digest:
* one file `N.tar` and one lock file `N.lock` for shard N. Who holds the lock (flock) downloads, the others wait. The kernel
  frees the lock of a process that dies. Lock files are never unlinked, or two processes would hold different ones.
* a download is `N.tar.part`, allocated first so that a full disk shows before it, then synced and renamed.
* an evicted file is unlinked: who has it open reads on, and its space comes back when the last one closes it.
* nothing outside of that folder is ever unlinked.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.data.remote.cache import check_cache
from distill.data.remote.fetch import Facts, FetchError, Remote, Trip
from distill.data.remote.indexed import check_indexed
from distill.data.remote.schedule import ShardSchedule
from distill.data.store import ShardInfo, ShardLost
from distill.data.stream import Position
from distill.files import file_sha256, sync

logger = logging.getLogger("distill.data")

POLL = 0.05
"""Seconds between two looks at a lock that another process holds: flock itself could not be interrupted."""
SPACE = ".space"
"""The lock file of whoever makes room."""
PART_FILE = ".tar.part"
SCAN_SECONDS = 1.0
"""Seconds between two looks at what could be fetched ahead."""


class _NoRoom(Exception):
    """A shard is not fetched ahead, in the place of others that are needed sooner."""


class CachedStore:
    """Shards of a remote store in the node's cache, fetched when they are opened and, by a schedule, before."""

    checks_arrivals = True

    def __init__(
        self,
        remote: Remote,
        shards: Sequence[ShardInfo],
        folder: Path,
        arrived: Callable[[int, int], None] = lambda shard, descriptor: None,
    ) -> None:
        """folder: the split's own in the cache. arrived: checks a shard that came, by its descriptor; raises ShardLost."""
        self.remote = remote
        self.folder = folder
        self.limit: int | None = None
        """Bytes that the folder may hold; None for as many as there are."""
        self._shards = shards
        self._all_bytes = sum(shard.bytes for shard in shards)
        self._arrived = arrived
        self._schedule: ShardSchedule | None = None
        self._position = Position(0, 0)
        self._stop = threading.Event()
        self._ahead: threading.Thread | None = None
        self._waits: dict[int, Trip | None] = {}
        """Shards that a reader waits for -> this process's download of it, None where another process downloads."""

    def check(self) -> None:
        """Makes the cache's folder and asks the store for what the manifest says. Raises ValueError."""
        check_cache(self.folder)
        check_indexed(self.remote, self._shards)

    def follow(self, schedule: ShardSchedule, limit: int | None) -> None:
        """Fetches ahead and evicts by a schedule from now on, in `limit` bytes."""
        self._schedule, self.limit = schedule, limit

    def held_bytes(self) -> int:
        """Bytes that the split's folder in the cache holds now."""
        return self._used() if self.folder.is_dir() else 0

    def path(self, shard: int) -> Path:
        """The shard's file in the cache, whether it is there or not."""
        return self.folder / f"{shard:05d}.tar"

    def where(self, shard: int) -> str:
        """The shard's URL."""
        return f"{self.remote.url}/{self._shards[shard].name}"

    def open(self, shard: int) -> int:
        """A descriptor of the shard's file, which is fetched where it is not there. Raises ShardLost."""
        descriptor = self._open_present(shard)
        if descriptor is None:
            self._waits[shard] = None
            try:
                descriptor = self._fetch(shard, wait=True)
            finally:
                self._waits.pop(shard, None)
            assert descriptor is not None
        return descriptor

    def reached(self, position: Position) -> Iterable[int]:
        """Starts the thread that fetches ahead; gives the shards that may be closed, where there is no room for all."""
        self._position = position
        if self._schedule is None or self._stop.is_set():
            return ()
        if self._ahead is None:
            self._ahead = threading.Thread(target=self._fetch_ahead, name="distill-ahead", daemon=True)
            self._ahead.start()
        if self.limit is None or self.limit >= self._all_bytes:
            return ()
        return self._schedule.idle(position)

    def renewed(self, shard: int, descriptor: int) -> bool:
        """Fetches a shard anew whose file in the cache is not what the store gives. Raises ShardLost.

        A file that has the sha256 of the manifest is not fetched again, nor one with the sha256 that the lock file says the
        store really has: the store itself is then what is damaged.
        """
        with self._locked(f"{shard:05d}.lock") as lock:
            assert lock is not None
            path, wanted = self.path(shard), self._shards[shard].sha256
            try:
                if path.stat().st_ino != os.fstat(descriptor).st_ino:
                    return True  # another process has renewed it
                found = file_sha256(path)
            except FileNotFoundError:
                return True  # evicted: it is fetched when it is opened
            if found == wanted or found == os.pread(lock, len(wanted), 0).decode():
                return False
            logger.warning("%s: its copy %s is damaged; fetched again", self.where(shard), path)
            path.unlink()
            fetched = self._download(shard, wait=True)
            again = file_sha256(Path(f"/proc/self/fd/{fetched}"))  # its name may be evicted meanwhile
            os.close(fetched)
            if again != wanted:
                logger.warning("%s: sha256 %s..., the manifest says %s...", self.where(shard), again[:12], wanted[:12])
                os.pwrite(lock, again.encode(), 0)
            return True

    def waiting(self) -> str:
        """Each shard that is waited for, with what has arrived of it."""
        return ", ".join(self._progress(shard, trip) for shard, trip in list(self._waits.items()))

    def close(self) -> None:
        """Stops downloads and the thread that fetches ahead; calling it twice is harmless."""
        self._stop.set()
        if self._ahead is not None:
            self._ahead.join(5.0)  # it ends after the parts that are on their way; a connection that hangs is left alone

    def _progress(self, shard: int, trip: Trip | None) -> str:
        size = f"{self._shards[shard].bytes / 1e6:.1f} MB"
        if trip is not None:
            return f"shard {self.where(shard)}, {trip.arrived / 1e6:.1f} of {size}"
        with suppress(FileNotFoundError):
            written = time.strftime("%X", time.localtime((self.folder / f"{shard:05d}{PART_FILE}").stat().st_mtime))
            return f"shard {self.where(shard)} of {size}, which another process fetches: a part came at {written}"
        return f"shard {self.where(shard)} of {size}, which another process fetches"

    def _open_present(self, shard: int) -> int | None:
        path = self.path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ShardLost(f"{path}: cannot be read ({error.strerror})") from error
        if os.fstat(descriptor).st_size == self._shards[shard].bytes:
            with suppress(FileNotFoundError):
                os.utime(path)  # where nobody knows what comes next, the one not used for longest goes first
            return descriptor
        os.close(descriptor)
        return None

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[int | None]:
        """The descriptor of a lock file, held; None where another has it and `wait` is false."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            yield lock if self._acquire(lock, wait) else None
        finally:
            os.close(lock)

    def _acquire(self, lock: int, wait: bool) -> bool:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    return False
            else:
                return True
            if self._stop.wait(POLL):
                raise ShardLost(f"{self.remote.url}: reading was stopped")

    def _fetch(self, shard: int, wait: bool) -> int | None:
        """A descriptor of the shard's file; None where another process is at it and `wait` is false. Raises ShardLost, and
        _NoRoom where it could only be had in place of shards that are needed sooner."""
        with self._locked(f"{shard:05d}.lock", wait) as lock:
            if lock is None:
                return None
            found = self._open_present(shard)  # whoever held the lock may have fetched it
            return self._download(shard, wait) if found is None else found

    def _download(self, shard: int, wait: bool) -> int:
        """Fetches a shard whose lock is held, and opens it before others can evict it."""
        info, part = self._shards[shard], self.folder / f"{shard:05d}{PART_FILE}"
        trip = Trip(self._stop)
        if wait:
            self._waits[shard] = trip
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise ShardLost(
                f"{part}: cannot be written ({error.strerror}); remove it, or give another data.cache_dir"
            ) from error
        try:
            self._allocate(descriptor, shard, wait)
            self.remote.fetch(info.name, Facts(info.bytes, info.etag, info.version), descriptor, trip)
            if (size := os.fstat(descriptor).st_size) != info.bytes:
                raise ShardLost(f"{self.where(shard)}: {size} bytes came, the manifest says {info.bytes}; index it again")
            self._arrived(shard, descriptor)
            os.fsync(descriptor)
            part.rename(self.path(shard))
            sync(self.folder)
        except BaseException as error:
            part.unlink(missing_ok=True)
            os.close(descriptor)
            if isinstance(error, FetchError):
                raise ShardLost(f"{error}; --resume goes on from the last checkpoint") from error
            raise
        return descriptor

    def _allocate(self, descriptor: int, shard: int, wait: bool) -> None:
        """Takes the shard's space, in the place of others where that is needed. Raises ShardLost where the disk is full, and
        _NoRoom, without `wait`, where shards that are needed sooner would have to go."""
        size = self._shards[shard].bytes
        with self._locked(SPACE):  # one process of the node at a time: what it has allocated is seen by the next
            used, victims = self._used(), self._victims(shard, wait)
            # a reader that waits gets its shard also above the limit: what is being downloaded cannot be evicted
            while self.limit is not None and used + size > self.limit and (wait or victims):
                if not victims:
                    break
                used -= self._evict(victims.pop())
            if not wait and self.limit is not None and used + size > self.limit:
                raise _NoRoom
            while size:
                try:
                    os.posix_fallocate(descriptor, 0, size)
                except OSError as error:
                    if error.errno == errno.ENOSPC and victims:
                        self._evict(victims.pop())
                        continue
                    if not wait:
                        raise _NoRoom from error
                    free = shutil.disk_usage(self.folder).free
                    raise ShardLost(
                        f"{self.where(shard)}: no room in {self.folder} ({error.strerror}): {size} bytes are needed, {free} are"
                        " free; make room, or give another data.cache_dir"
                    ) from error
                return

    def _used(self) -> int:
        """Bytes of the split's shards in the cache, without what a killed process left of a download."""
        used = 0
        for path in self.folder.glob("*.tar*"):  # the index of a split at a URL lies there too, and stays
            with suppress(FileNotFoundError):
                if path.name.endswith(PART_FILE):
                    with self._locked(f"{path.name.removesuffix(PART_FILE)}.lock", wait=False) as lock:
                        if lock is not None:
                            path.unlink()
                used += path.stat().st_size
        return used

    def _victims(self, shard: int, wait: bool) -> list[Path]:
        """Files that may go for a shard, the one to go first at the end: the one that is needed last, or, where nothing says
        that, the one that was not used for longest."""
        files = {number: path for number in range(len(self._shards)) if (path := self.path(number)).exists()}
        files.pop(shard, None)
        if self._schedule is None:
            return sorted(files.values(), key=_age)
        use = self._schedule.next_use(self._position)
        kept = [number for number in files if wait or use[number] > use[shard]]
        return [files[number] for number in sorted(kept, key=lambda number: (use[number], _age(files[number])))]

    def _evict(self, path: Path) -> int:
        with suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            return size
        return 0

    def _fetch_ahead(self) -> None:
        """Fetches what is needed next for as long as there is room; the processes of a node share the work by the locks."""
        assert self._schedule is not None
        while not self._stop.is_set():
            try:
                fetched = any(map(self._fetched_ahead, self._schedule.upcoming(self._position)))
            except _NoRoom:
                fetched = False
            except (OSError, ValueError) as error:  # whoever needs the shard tries again, and says it to the run
                logger.warning("fetching ahead: %s", error)
                fetched = False
            if not fetched:
                self._stop.wait(SCAN_SECONDS)

    def _fetched_ahead(self, shard: int) -> bool:
        if self._stop.is_set() or self.path(shard).exists():
            return False
        descriptor = self._fetch(shard, wait=False)
        if descriptor is None:
            return False
        os.close(descriptor)
        return True


def _age(path: Path) -> float:
    """Seconds since the file was used, as far as it is there."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
