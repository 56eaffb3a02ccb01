"""The store that a URL means."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping

from distill.data.remote.buckets import ObjectRemote
from distill.data.remote.fetch import Remote
from distill.data.remote.hub import HubRemote
from distill.data.remote.pipe import PipeRemote
from distill.data.remote.web import HttpRemote

SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|pipe:")
"""Also of schemes that no store has, and with one slash: such a typo is refused, and makes no folder of this name."""


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
        return HubRemote(url)
    return HttpRemote(url) if scheme in ("http", "https") else ObjectRemote(url, options or {})
