"""Whether the objects of a store are still those that were indexed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from distill.data.remote.fetch import Denied, Facts, FetchError, Remote, replaced, retried
from distill.data.store import ShardInfo


def check_indexed(remote: Remote, shards: Sequence[ShardInfo]) -> None:
    """Asks the store for what the manifest says, by a listing where it can list, else by the first shard alone.

    Raises ValueError where access is denied, a shard is missing, or it is another than was indexed.
    """
    if not shards:
        return
    first = shards[0]
    try:
        _compare(remote, first, _facts(remote, first))  # a HEAD, for the right to list is not the right to read
        listed = None
        if not first.version:  # a version stays readable whatever came after it
            with suppress(Denied):
                listed = retried(remote.listing)
        if listed:
            for shard in shards:
                _compare(remote, shard, listed.get(shard.name))
    except FetchError as error:
        raise ValueError(str(error)) from error


def _facts(remote: Remote, shard: ShardInfo) -> Facts:
    return retried(lambda: remote.facts(shard.name))


def _compare(remote: Remote, shard: ShardInfo, found: Facts | None) -> None:
    if found is None:
        raise ValueError(f"{remote.url}/{shard.name}: shard is missing; upload it again, or index the shards again")
    known = Facts(shard.bytes, shard.etag, shard.version)
    if shard.version or same_object(known, found):
        return
    # some stores write ETags in another way in their listings
    if not same_object(known, found := _facts(remote, shard)):
        raise replaced(f"{remote.url}/{shard.name}", known, found)


def same_object(known: Facts, found: Facts) -> bool:
    """Whether an object is the known one by what a store says; what it does not say is not compared."""
    same_size = found.size < 0 or found.size == known.size
    return same_size and (not known.etag or not found.etag or known.etag == found.etag)
