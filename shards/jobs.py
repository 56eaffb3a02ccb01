"""The unit of work, one shard, and the marker that says it is done; jobs travel to worker processes and machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.data.index import RECORD, ShardInfo
from distill.data.remote.fetch import Facts
from distill.files import json_bytes, write_atomically
from shards.items import Item

PARTS = ".parts"
"""Folder of the markers and index rows of finished shards, below the split's; it goes when the split is finished."""


@dataclass(frozen=True)
class ShardJob:
    """Everything that makes one shard, so that any worker on any machine can: the shard is a pure function of it."""

    folder: str
    number: int
    name: str
    items: Sequence[Item]
    resize_short: int | None = None
    quality: int = 90
    upload: str = ""
    """The URL that the shard goes to when it is made; empty for none."""


class RemoteShard(NamedTuple):
    """Where a remote shard is: the store's URL and options, and what it says of the object."""

    root: str
    options: Mapping[str, str]
    facts: Facts


@dataclass(frozen=True)
class IndexJob:
    """Everything that indexes one existing shard."""

    folder: str
    number: int
    name: str
    path: str
    json_label: str | None = None
    """The place of the label in the sample's .json, with dots between its parts."""
    label: str | None = None
    """The field of the label; None looks for one of the usual names."""
    image: str | None = None
    """The field of the image; None looks for one of the usual names."""
    class_names: tuple[str, ...] | None = None
    """Names by class number; None where nobody says them."""
    remote: RemoteShard | None = None
    """None for a file at `path`, which is a URL otherwise."""


Job = ShardJob | IndexJob


@dataclass(frozen=True)
class ShardResult:
    """The result of one job; it is kept as the shard's marker."""

    number: int
    shard: ShardInfo
    read_bytes: int
    read_samples: int
    quarantine: list[dict[str, Any]] = field(default_factory=list)
    """Refused images: key, source, label and reason of each."""
    notes: list[dict[str, Any]] = field(default_factory=list)
    """Images that were repaired, or of which something is worth knowing: key, source and note of each."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Members that are passed over: what they are, and how many."""


def shard_path(job: Job) -> Path:
    """The path at which the job's shard lies, or will lie."""
    return Path(job.folder) / job.name if isinstance(job, ShardJob) else Path(job.path)


def read_marker(job: Job) -> ShardResult | None:
    """The marker of a job that is done, whose shard and index rows have the sizes that it says; None for any other."""
    try:
        content = json.loads(_marker_path(job).read_text())
        result = ShardResult(**{**content, "shard": ShardInfo(**content["shard"])})
        rows = rows_path(Path(job.folder), job.number).stat().st_size  # an earlier version's rows are shorter
        expected = (job.name, *_facts(result.shard), result.shard.samples * RECORD.itemsize)
        uploaded = isinstance(job, ShardJob) and job.upload and result.shard.etag  # and has no local file any more
        finished = (result.shard.name, *_facts(result.shard if uploaded else job), rows) == expected
    except FileNotFoundError:
        return None
    return result if finished else None


def _facts(found: Job | ShardInfo) -> Facts:
    """The shard as it is now, or as it was indexed."""
    if isinstance(found, ShardInfo):
        return Facts(found.bytes, found.etag, found.version)
    if isinstance(found, IndexJob) and found.remote is not None:
        return found.remote.facts
    return Facts(shard_path(found).stat().st_size)


def write_marker(job: Job, result: ShardResult, records: NDArray[np.void]) -> None:
    """Declares the job done: its index rows, then the marker last."""
    write_atomically(rows_path(Path(job.folder), job.number), records.tobytes())
    write_mark(job, result)


def write_mark(job: Job, result: ShardResult) -> None:
    """Writes the marker of a job whose index rows are there."""
    write_atomically(_marker_path(job), json_bytes(asdict(result)))


def rows_path(folder: Path, number: int) -> Path:
    """The file in which the index rows of a finished shard wait for the others."""
    return folder / PARTS / f"{number}.rows"


def _marker_path(job: Job) -> Path:
    return Path(job.folder) / PARTS / f"{job.number}.json"
