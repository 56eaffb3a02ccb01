"""Objects behind a web server: `https://HOST/PATH`, by the standard library."""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from distill.data.remote.fetch import (
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

IDLE_SECONDS = 60.0
"""A connection that gives nothing for so long is taken for dead."""
URL_SAFE = ":/[]!$&'()*+,;=%~"


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
        """Writes the object in parts, each only if it has still the ETag of `facts`."""
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
                raise replaced(url, known, facts_or_none(self, name)) from error
            if error.code in RETRIED:
                raise Busy(f"{url}: {said}", _seconds(error.headers.get("Retry-After"))) from error
            raise FetchError(f"{url}: {said}") from error
        except (OSError, http.client.HTTPException) as error:  # no connection, a reset, a time-out
            if isinstance(untrusted := getattr(error, "reason", None), ssl.SSLCertVerificationError):
                raise FetchError(
                    f"{url}: its certificate is not trusted ({untrusted.verify_message}); name the file of your authority's"
                    " certificate in SSL_CERT_FILE"
                ) from error
            raise Busy(f"{url}: no answer ({getattr(error, 'reason', error)})") from error


def asked_to_wait(url: str) -> float | None:
    """The seconds that a busy server asks to wait before the next request; None where it serves, or says nothing of it.

    Asks for one byte. url: complete and quoted, such as a signed one.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=0-0"}), timeout=IDLE_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        return _seconds(error.headers.get("Retry-After"))
    except (OSError, http.client.HTTPException):
        pass
    return None


def _seconds(retry_after: str | None) -> float | None:
    """The seconds of a Retry-After; None for the form that is a date, which a clock that is off would misread."""
    return float(retry_after) if retry_after and retry_after.isdecimal() else None
