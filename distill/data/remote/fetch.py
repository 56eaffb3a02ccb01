"""Objects of a remote store: what they are, and their bytes, pinned to a version, in parts that are counted.

The one remote operation of training is "the whole object into a file". Each kind of store has a file beside this one: `web.py`,
`buckets.py`, `hub.py` and `pipe.py`; `urls.py` knows which a URL means.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple, Protocol, TypeVar

logger = logging.getLogger("distill.data")

PART = 8 << 20
"""Bytes of a part: 0.1 s of a store's connection, which gives 50 to 100 MB/s. Small to repeat, large beside a request."""
CONNECTIONS = 8
"""Parts of an object that one process fetches at a time."""
TRIES = 5
BACKOFF = 0.5
"""Seconds before the second try; they double, with jitter, so that many processes do not come back at the same moment."""
LONGEST_WAIT = 600.0
"""Seconds of a Retry-After that are waited for; the hub's windows have 300."""
UNKNOWN = -1
"""The size of an object that only its last byte tells."""
RETRIED = {408, 429, *range(500, 600)} - {501, 505}
"""HTTP's answers after which the same request may succeed."""
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_SKIP_SIGNATURE, AWS_WEB_IDENTITY_TOKEN_FILE, then"
    " the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, then the machine's service account",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_KEY, AZURE_CLIENT_ID, then the machine's"
    " identity",
    "https": "none: it is asked without any; for a server that wants some take `pipe:curl ... {}`",
    "hf": "HF_TOKEN and the token that `hf auth login` keeps",
}
"""Where each kind of store finds its credentials; `http` counts as `https`."""

Result = TypeVar("Result")


class FetchError(OSError):
    """An object cannot be had; the text names its URL and the store's answer."""


class Busy(FetchError):
    """The store did not serve a request that may succeed later."""

    def __init__(self, text: str, seconds: float | None = None) -> None:
        """seconds: the time that the store asks to wait; None where it says nothing."""
        super().__init__(text)
        self.seconds = seconds


class Denied(FetchError):
    """The store refuses these credentials; a repetition changes nothing."""


class Missing(FetchError):
    """There is no such object."""


class Replaced(FetchError):
    """The object is not the one that was asked for any more."""


class Facts(NamedTuple):
    """What a store says of an object."""

    size: int
    etag: str = ""
    """Opaque, compared for equality only; empty where the store has none."""
    version: str = ""
    """A name under which this version stays readable (S3's VersionId, GCS' generation, a commit of the hub), or empty."""


class Trip:
    """A download while it goes on: it can be stopped from outside, and it counts what has arrived."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self.arrived = 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        """Counts bytes that have arrived; parts arrive in several threads."""
        with self._lock:
            self.arrived += count


class Remote(Protocol):
    """A place of objects by name: a bucket with a prefix, a folder behind https, a folder of a hub's repository."""

    url: str

    def facts(self, name: str) -> Facts:
        """What the store says of an object. Raises FetchError."""
        ...

    def listing(self) -> dict[str, Facts] | None:
        """All objects below; None where the store cannot list. Raises FetchError."""
        ...

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """Writes the whole object to the descriptor `file`, from its start. Raises FetchError, Replaced where the object's
        ETag or version is another than that of `facts`."""
        ...


def read_object(remote: Remote, name: str) -> bytes:
    """The content of a small object, such as a manifest. Raises FetchError."""
    with tempfile.TemporaryFile() as file:
        remote.fetch(name, retried(lambda: remote.facts(name)), file.fileno(), Trip())
        file.seek(0)
        return file.read()


def facts_or_none(remote: Remote, name: str) -> Facts | None:
    """What the store says of an object; None where it cannot be asked."""
    try:
        return remote.facts(name)
    except FetchError:
        return None


def retried(action: Callable[[], Result], stop: threading.Event | None = None) -> Result:
    """The result of `action`, tried again while the store is busy, `TRIES` times in all. Raises Busy after the last."""
    stop = stop or threading.Event()
    for attempt in range(1, TRIES):
        try:
            return action()
        except Busy as error:
            seconds = error.seconds
            if seconds is None:
                seconds = BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            seconds = min(seconds, LONGEST_WAIT)
            logger.warning("%s; try %d of %d in %.1f s", error, attempt + 1, TRIES, seconds)
            if stop.wait(seconds):
                raise FetchError(f"{error}; stopped") from error
    return action()


def fetch_parts(
    part: Callable[[int, int], bytes], what: str, size: int, file: int, trip: Trip, connections: int = CONNECTIONS
) -> None:
    """Writes an object of `size` bytes to the descriptor `file`; `part(start, end)` gives its bytes, some parts at a time.

    A part that is short counts as busy: ranges that reach over an object's end, and some proxies, are short without a word.
    """

    def whole(start: int, end: int) -> bytes:
        data = part(start, end)
        if len(data) != end - start:
            raise Busy(f"{what}: {len(data)} bytes came of {start} to {end}")
        return data

    def fetch(start: int) -> None:
        if trip.stop.is_set():
            raise FetchError(f"{what}: stopped")
        end = min(start + PART, size)
        data = retried(lambda: whole(start, end), trip.stop)
        write_all(file, data, start)
        trip.advance(len(data))

    with ThreadPoolExecutor(connections, thread_name_prefix="distill-fetch") as pool:
        futures = [pool.submit(fetch, start) for start in range(0, size, PART)]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            for future in futures:
                future.cancel()


def write_all(file: int, data: bytes, offset: int) -> None:
    """Writes data at an offset. Raises OSError where the disk takes only a part of it."""
    if os.pwrite(file, data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def denied(url: str, kind: str, answer: str) -> Denied:
    """The error of refused credentials: it names where they are looked for, never their values."""
    return Denied(f"{url}: access denied ({answer}); credentials are looked for in {CREDENTIALS[kind]}")


def replaced(url: str, known: Facts, now: Facts | None) -> Replaced:
    """The error of an object that another has replaced."""
    there = f"has {_version(now)}" if now is not None else "has another"
    return Replaced(
        f"{url}: was replaced since it was indexed: {_version(known)} then, it {there} now; index the shards again with"
        " `python shards/prepare.py wds`"
    )


def _version(facts: Facts) -> str:
    named = f", version {facts.version}" if facts.version else ""
    return f"ETag {facts.etag or 'none'}{named}, {facts.size} bytes"
