"""Finished shards into a bucket: each goes there as soon as it is made, and its local file goes; the manifest goes last.

Order of a shard: its marker, the upload, the marker again with the object's ETag, the local file's end. Killed in between, the
next start uploads it again under the same name, which changes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from distill.data.remote.buckets import ObjectRemote
from distill.data.remote.cache import cache_folder
from distill.data.remote.fetch import FetchError, retried
from distill.data.remote.urls import remote_of
from shards.jobs import ShardJob, ShardResult, shard_path, write_mark


def stage_of(url: str) -> Path:
    """The folder in which what goes to a URL is made."""
    return cache_folder() / "prepared" / hashlib.sha256(url.encode()).hexdigest()[:16]


def bucket(url: str) -> ObjectRemote:
    """The store of a URL that can be written to. Raises ValueError for another."""
    remote = remote_of(url)
    if not isinstance(remote, ObjectRemote):
        raise ValueError(f"--out {url}: only s3://, gs:// and az:// can be written to; give a folder, and copy it there")
    return remote


def upload_shard(job: ShardJob, result: ShardResult) -> ShardResult:
    """Uploads a shard that is made, unless it was before; its result with the object's ETag. Raises FetchError."""
    if result.shard.etag:
        return result
    _, etag, version = put(bucket(job.upload), job.name, shard_path(job))
    done = replace(result, shard=replace(result.shard, etag=etag, version=version))
    write_mark(job, done)
    shard_path(job).unlink()
    return done


def put(remote: ObjectRemote, name: str, path: Path) -> tuple[int, str, str]:
    """Uploads a file; size, ETag and version that the store says it has now. Raises FetchError where it is another size."""
    facts = retried(lambda: remote.put(name, path))
    if facts.size != (size := path.stat().st_size):
        raise FetchError(f"{remote.url}/{name}: has {facts.size} bytes after the upload of {size}")
    return facts
