"""Objects of a remote store: what they are, and their bytes, pinned to a version, in parts that are counted.

The one remote operation of training is "the whole object into a file". `remote_of` names the store by the scheme of its URL:
`s3://`, `gs://` and `az://` through obstore, `https://` by the standard library, `hf://` (in `hub.py`) through huggingface_hub,
and `pipe:` through a command.
"""

from __future__ import annotations

import errno
import http.client
import logging
import os
import random
import re
import shlex
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

from distill.children import last_error

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
IDLE_SECONDS = 60.0
"""A connection that gives nothing for so long is taken for dead."""
UNKNOWN = -1
"""The size of an object that only its last byte tells."""
SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")
"""Also of schemes that no store has, and with one slash: such a typo is refused, and makes no folder of this name."""
URL_SAFE = ":/[]!$&'()*+,;=%~"
RETRIED = {408, 429, *range(500, 600)}
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

METADATA = re.compile(r"/latest/(?:api/token|meta-data)|/computeMetadata/|/metadata/identity")
"""The paths at which a cloud tells its machines their role."""
STORE_OPTIONS = {"region": ("AWS_REGION", "AWS_DEFAULT_REGION"), "endpoint": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")}
"""Where S3 is, as a manifest says it -> the variables of the environment that say it, and then count."""

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


def is_url(place: str) -> bool:
    """Whether a place is remote, or was meant to be; anything else is a folder."""
    return URL.match(place) is not None


def remote_of(url: str, options: Mapping[str, str] | None = None) -> Remote:
    """The store of a URL. `options` are its region and endpoint, where the environment does not name them.

    Raises ValueError where the URL carries credentials, the library is not installed, or the store's address is incomplete.
    """
    if url.startswith("pipe:"):
        return PipeRemote(url)
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise ValueError(f"{url.partition('/')[0]}/...: no scheme of a store; there are {known} and pipe:")
    try:
        address = urllib.parse.urlsplit(url)
        complete = address.hostname and address.port != 0
    except ValueError as error:  # a port that is no number, half of a pair of brackets
        raise ValueError(f"{scheme}://...: no URL ({error})") from error
    if address.username or address.password or address.query:
        raise ValueError(
            f"{scheme}://{address.hostname}...: the URL has a user, a password or a query, which manifests and logs would keep;"
            " give credentials in the environment"
        )
    if not complete:
        raise ValueError(f"{url}: names no host and no bucket")
    url = url.rstrip("/")
    if scheme == "hf":
        from distill.data.remote.hub import HubRemote

        return HubRemote(url)
    return HttpRemote(url) if scheme in ("http", "https") else ObjectRemote(url, options or {})


def store_options(url: str) -> dict[str, str]:
    """What a manifest says of where a store is: region and endpoint of S3 in the environment, and nothing secret."""
    found = {name: _said(name) for name in STORE_OPTIONS} if url.startswith("s3://") else {}
    return {name: value for name, value in found.items() if value}


def _said(option: str) -> str:
    return next((os.environ[name] for name in STORE_OPTIONS[option] if os.environ.get(name)), "")


def read_object(remote: Remote, name: str) -> bytes:
    """The content of a small object, such as a manifest. Raises FetchError."""
    with tempfile.TemporaryFile() as file:
        remote.fetch(name, retried(lambda: remote.facts(name)), file.fileno(), Trip())
        file.seek(0)
        return file.read()


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


class HttpRemote:
    """Objects behind a web server that serves ranges. It cannot list.

    Not through obstore: that gives no answer's Retry-After (0.12), and this needs nothing installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def facts(self, name: str) -> Facts:
        """The answer to a HEAD request."""
        with self._answer(name, "HEAD", {}) as answer:
            length = answer.headers.get("Content-Length")
            return Facts(UNKNOWN if length is None else int(length), answer.headers.get("ETag", ""))

    def listing(self) -> None:
        """None: web servers have no listing that programs can read."""
        return None

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """In parts, each only if the object has still the ETag of `facts`."""
        if facts.size < 0:
            raise FetchError(f"{self.url}/{name}: the server does not say its size; take `pipe:curl -sf {self.url}/{{}}`")
        fetch_parts(lambda start, end: self._part(name, start, end, facts), f"{self.url}/{name}", facts.size, file, trip)

    def _part(self, name: str, start: int, end: int, facts: Facts) -> bytes:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        # a weak ETag never matches: RFC 9110 compares If-Match strongly
        if facts.etag and not facts.etag.startswith("W/"):
            headers["If-Match"] = facts.etag
        with self._answer(name, "GET", headers, facts) as answer:
            if (etag := answer.headers.get("ETag", "")) and facts.etag and etag != facts.etag:
                raise replaced(f"{self.url}/{name}", facts, Facts(facts.size, etag))
            if answer.status != 206 and (start, end) != (0, facts.size):
                raise FetchError(f"{self.url}/{name}: the server does not serve ranges; take `pipe:curl -sf {self.url}/{{}}`")
            try:
                return answer.read(end - start)
            except (OSError, http.client.HTTPException) as error:
                raise Busy(f"{self.url}/{name}: the answer broke off ({error!r})") from error

    def _answer(self, name: str, method: str, headers: dict[str, str], known: Facts | None = None) -> Any:
        # what people typed may have spaces; what is quoted in it stays so
        url = f"{urllib.parse.quote(self.url, safe=URL_SAFE)}/{urllib.parse.quote(name)}"
        try:
            return urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=IDLE_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            said = f"HTTP {error.code} {error.reason}"
            if error.code in (401, 403):
                raise denied(url, "https", said) from error
            if error.code in (404, 410):
                raise Missing(f"{url}: not there ({said})") from error
            if error.code == 412 and known is not None:
                raise replaced(url, known, self._facts_or_none(name)) from error
            if error.code in RETRIED:
                raise Busy(f"{url}: {said}", _seconds(error.headers.get("Retry-After"))) from error
            raise FetchError(f"{url}: {said}") from error
        except (OSError, http.client.HTTPException) as error:  # no connection, a reset, a time-out
            raise Busy(f"{url}: no answer ({getattr(error, 'reason', error)})") from error

    def _facts_or_none(self, name: str) -> Facts | None:
        try:
            return self.facts(name)
        except FetchError:
            return None


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After; None for the form that is a date, which a clock that is off would misread."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else None


class ObjectRemote:
    """Objects of S3, GCS or Azure below a prefix, through obstore."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        try:
            import obstore
            from obstore.store import from_url
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{url}: the package obstore reads it and is not installed; install the extra `remote`, as"
                " `pip install -e '.[remote]'`"
            ) from error
        self.url = url
        self._kind = url.partition("://")[0]
        self._obstore = obstore
        # ours are the repetitions: obstore's are silent, and a body that broke off it takes up in one of its ways only
        retry: Any = {"max_retries": 0}
        # 120 s for a part of 8 MB: 70 kB/s, below which nobody trains
        client: Any = {"timeout": "120s", "connect_timeout": "10s", "allow_http": True}
        config = {k: v for k, v in options.items() if self._kind == "s3" and v and k in STORE_OPTIONS and not _said(k)}
        try:
            self._store: Any = from_url(url, config=config, client_options=client, retry_config=retry)
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise ValueError(f"{url}: {_first_line(error)}; {self._kind}:// reads {CREDENTIALS[self._kind]}") from error

    def facts(self, name: str) -> Facts:
        """The answer to a HEAD request."""
        return _facts(self._asked(name, lambda: self._obstore.head(self._store, name)))

    def listing(self) -> dict[str, Facts]:
        """One request for each 1,000 objects."""
        batches = self._asked("", lambda: list(self._obstore.list(self._store)))
        return {meta["path"]: _facts(meta) for batch in batches for meta in batch}

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """In parts, each only if the object has still the ETag of `facts`, of the version of `facts`."""
        what = f"{self.url}/{name}"
        fetch_parts(lambda start, end: self._part(name, start, end, facts), what, facts.size, file, trip)

    def put(self, name: str, path: Path) -> Facts:
        """Uploads a file, a large one in parts; what the store says of it then. Raises FetchError."""
        self._asked(name, lambda: self._obstore.put(self._store, name, path))
        return self.facts(name)

    def _part(self, name: str, start: int, end: int, facts: Facts) -> bytes:
        options: dict[str, Any] = {"range": (start, end)}
        if facts.etag:
            options["if_match"] = facts.etag
        if facts.version:
            options["version"] = facts.version

        def part() -> bytes:
            answer = self._obstore.get(self._store, name, options=options)
            if facts.etag and (answer.meta["e_tag"] or facts.etag) != facts.etag:  # a server that ignores If-Match
                raise replaced(f"{self.url}/{name}", facts, _facts(answer.meta))
            return bytes(answer.bytes())

        return self._asked(name, part, facts)

    def _asked(self, name: str, action: Callable[[], Result], known: Facts | None = None) -> Result:
        """The result of a request, whose errors become ours."""
        url, errors = f"{self.url}/{name}".rstrip("/"), self._obstore.exceptions
        try:
            return action()
        except FetchError:
            raise
        except (errors.UnauthenticatedError, errors.PermissionDeniedError) as error:
            raise denied(url, self._kind, _first_line(error)) from error
        except errors.PreconditionError as error:
            raise replaced(url, known or Facts(UNKNOWN), self._facts_or_none(name)) from error
        except FileNotFoundError as error:
            raise Missing(f"{url}: not there ({_first_line(error)})") from error
        except errors.BaseError as error:
            said = _first_line(error)
            if METADATA.search(said):  # which is asked where the environment has no credentials
                said += f"; credentials are looked for in {CREDENTIALS[self._kind]}"
            if "ExpiredToken" in str(error):  # S3 says it with 400
                raise denied(url, self._kind, said) from error
            status = re.search(r"status code: (\d+)", said)
            if status is not None and int(status[1]) not in RETRIED:
                raise FetchError(f"{url}: {said}") from error
            raise Busy(f"{url}: {said}") from error

    def _facts_or_none(self, name: str) -> Facts | None:
        try:
            return self.facts(name)
        except FetchError:
            return None


def _facts(meta: Mapping[str, Any]) -> Facts:
    return Facts(meta["size"], meta["e_tag"] or "", meta["version"] or "")


def _first_line(error: BaseException) -> str:
    """obstore's own words, without the dump of its structures below them."""
    return str(error).split("\n", 1)[0]


class PipeRemote:
    """Objects that a command writes to its stdout; `{}` in it is the object's name, quoted for the shell.

    It gives no ETag, so that sizes and checksums are all that tells a replaced object.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._command = url.removeprefix("pipe:").strip()
        if "{}" not in self._command:
            raise ValueError(f"{url}: has no {{}} for the name of the object, as in `pipe:aws s3 cp s3://bucket/train/{{}} -`")

    def facts(self, name: str) -> Facts:
        """Nothing: a command says no more than the bytes."""
        return Facts(UNKNOWN)

    def listing(self) -> None:
        """None: nothing lists."""
        return None

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """The command's output from its beginning; after a failure the command runs again."""
        retried(lambda: self._copy(name, facts.size, file, trip), trip.stop)

    def _copy(self, name: str, size: int, file: int, trip: Trip) -> None:
        trip.advance(-trip.arrived)
        command = self._command.replace("{}", shlex.quote(name))
        with tempfile.TemporaryFile("w+", errors="replace") as err:
            child = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=err, start_new_session=True)
            try:
                assert child.stdout is not None
                self._write(child.stdout, size, file, trip)
                code = child.wait()
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, 9)
                    child.wait()
                if child.stdout is not None:
                    child.stdout.close()
            err.seek(0)
            said = last_error(err.read()) or "nothing on stderr"
        if code:
            raise Busy(f"exit code {code} of {command}: {said}")
        if size < 0:
            os.ftruncate(file, trip.arrived)  # a try that failed may have written more
        if size >= 0 and trip.arrived != size:
            raise Busy(f"{trip.arrived} bytes came instead of {size} from {command}: {said}")

    def _write(self, output: IO[bytes], size: int, file: int, trip: Trip) -> None:
        while (block := output.read(1 << 20)) and not trip.stop.is_set():
            if 0 <= size < trip.arrived + len(block):
                raise Replaced(f"{self.url}: gives more than the {size} bytes that were indexed; index the shards again")
            write_all(file, block, trip.arrived)
            trip.advance(len(block))
