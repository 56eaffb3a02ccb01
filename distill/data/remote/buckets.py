"""Objects of S3, GCS and Azure: `s3://`, `gs://` and `az://`, through obstore."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from distill.data.remote.fetch import (
    BACKOFF,
    CREDENTIALS,
    RETRIED,
    UNKNOWN,
    Busy,
    Facts,
    FetchError,
    Missing,
    Trip,
    denied,
    facts_or_none,
    fetch_parts,
    replaced,
)
from distill.data.remote.web import asked_to_wait

METADATA = re.compile(r"/latest/(?:api/token|meta-data)|/computeMetadata/|/metadata/identity")
"""The paths at which a cloud tells its machines their role."""
THROTTLED = {429, 503}
"""The answers that may say, as Retry-After, when to come again."""
SIGNED_FOR = timedelta(minutes=1)
STORE_OPTIONS = {"region": ("AWS_REGION", "AWS_DEFAULT_REGION"), "endpoint": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT")}
"""Where S3 is, as a manifest says it -> the variables of the environment that say it, and then count."""

Result = TypeVar("Result")


def store_options(url: str) -> dict[str, str]:
    """What a manifest says of where a store is: region and endpoint of S3 in the environment, and nothing secret."""
    found = {name: _said(name) for name in STORE_OPTIONS} if url.startswith("s3://") else {}
    return {name: value for name, value in found.items() if value}


def _said(option: str) -> str:
    return next((os.environ[name] for name in STORE_OPTIONS[option] if os.environ.get(name)), "")


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
        self._asking = threading.Lock()
        self._asked_at = -math.inf
        self._told: float | None = None

    def facts(self, name: str) -> Facts:
        """The answer to a HEAD request."""
        return _facts(self._asked(name, lambda: self._obstore.head(self._store, name)))

    def listing(self) -> dict[str, Facts]:
        """One request for each 1,000 objects."""
        batches = self._asked("", lambda: list(self._obstore.list(self._store)))
        return {meta["path"]: _facts(meta) for batch in batches for meta in batch}

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """Writes the object in parts, each only if it has still the ETag of `facts`, of the version of `facts`."""
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
            raise replaced(url, known or Facts(UNKNOWN), facts_or_none(self, name)) from error
        except FileNotFoundError as error:
            raise Missing(f"{url}: not there ({_first_line(error)})") from error
        except errors.BaseError as error:
            said = _first_line(error)
            if METADATA.search(said):  # which is asked where the environment has no credentials
                said += f"; credentials are looked for in {CREDENTIALS[self._kind]}"
            if "ExpiredToken" in str(error):  # S3 says it with 400
                raise denied(url, self._kind, said) from error
            found = re.search(r"status code: (\d+)", said)
            status = int(found[1]) if found is not None else 0
            if status and status not in RETRIED:
                raise FetchError(f"{url}: {said}") from error
            raise Busy(f"{url}: {said}", self._asked_to_wait(name) if name and status in THROTTLED else None) from error

    def _asked_to_wait(self, name: str) -> float | None:
        """Seconds of the Retry-After of a busy store; None where nobody can know.

        obstore keeps no header of an answer (0.12), so a signed URL asks once more, for all parts that wait at that moment.
        Credentials without a key, such as none, sign nothing.
        """
        with self._asking:
            if time.monotonic() - self._asked_at > BACKOFF:
                try:
                    self._told = asked_to_wait(self._obstore.sign(self._store, "GET", name, SIGNED_FOR))
                except (self._obstore.exceptions.BaseError, ValueError):
                    self._told = None
                self._asked_at = time.monotonic()
            return self._told


def _facts(meta: Mapping[str, Any]) -> Facts:
    return Facts(meta["size"], meta["e_tag"] or "", meta["version"] or "")


def _first_line(error: BaseException) -> str:
    """obstore's own words, without the dump of its structures below them."""
    return str(error).split("\n", 1)[0]
