"""Existing shards of a remote store: which there are, what the store says of them, and one of them at a time as a file here."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, cast

from braceexpand import braceexpand

from distill.data.remote.buckets import store_options
from distill.data.remote.fetch import Facts, FetchError, Missing, Remote, Trip, read_object, retried
from distill.data.remote.urls import remote_of
from shards.jobs import PARTS, IndexJob
from shards.splits import COMPRESSED_NAMES, INFO_NAMES, find_splits

ASKED_AT_ONCE = 16
"""Objects that the store is asked about at a time."""


class RemoteShards(NamedTuple):
    """The shards of each split of a remote source."""

    root: str
    """The URL of the source; of the hub, with its commit."""
    options: Mapping[str, str]
    """Where the store is, for the manifest."""
    splits: Mapping[str, list[str]]
    facts: Mapping[str, Facts]
    left: list[str]
    """Shards of no split."""


def find_remote_splits(url: str, asked: Mapping[str, str]) -> RemoteShards:
    """The shards at a URL, told apart as those of a folder are: by patterns, `_info.json` or their names.

    A store that cannot list (https) needs `_info.json`, or patterns without wildcards. Raises ValueError as `find_splits` does,
    and where the store refuses access or a shard is not there.
    """
    if url.startswith("pipe:"):
        raise ValueError(f"{url}: a command can be read from, and not asked what there is; give --source another URL")
    try:
        remote = remote_of(url)
        listed = retried(remote.listing)
        with tempfile.TemporaryDirectory() as place:
            names = _laid_out(remote, Path(place), listed, asked)
            try:
                found = find_splits(Path(place), asked)
            except ValueError as error:
                raise ValueError(_explained(str(error).replace(place, url), listed)) from error
            splits = {split: [path.relative_to(place).as_posix() for path in paths] for split, paths in found.items()}
        taken = [name for shards in splits.values() for name in shards]
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:  # a listing has no versions, but for the hub's
            known = listed or {}
            facts = pool.map(lambda name: known[name] if name in known and known[name].version else _facts(remote, name), taken)
            return RemoteShards(
                remote.url, store_options(url), splits, dict(zip(taken, facts, strict=True)), sorted(set(names) - set(taken))
            )
    except FetchError as error:
        raise ValueError(str(error)) from error


def _laid_out(remote: Remote, place: Path, listed: Mapping[str, Facts] | None, asked: Mapping[str, str]) -> list[str]:
    """Lays the names of the source's shards out as empty files, so that patterns and names mean what they do in a folder."""
    info = next((name for name in INFO_NAMES if name in listed), "") if listed is not None else INFO_NAMES[0]
    if info and not asked:
        try:
            (place / info).write_bytes(read_object(remote, info))
        except Missing:
            info = ""
    if listed is not None:
        names = [name for name in listed if name.endswith((".tar", *COMPRESSED_NAMES))]
    else:
        names = [name for pattern in asked.values() for name in braceexpand(pattern) if not set(name) & set("*?[")]
        names += _named(place / info) if info and not asked else []
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{remote.url}: names the shard {name}, which lies outside of it; give names below it")
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    return [name for name in names if name.endswith(".tar")]


def _named(info: Path) -> list[str]:
    try:
        listed = [split["filenames"] for split in json.loads(info.read_text())["splits"].values()]
        texts = [text for names in listed for text in ([names] if isinstance(names, str) else names)]
        return [name for text in texts for name in braceexpand(text)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # there is none, or `find_splits` says what is wrong with it


def _explained(message: str, listed: Mapping[str, Facts] | None) -> str:
    if listed is not None:
        return message
    return f"{message}; this store cannot list: name all, as --split train=train-{{0000..0012}}.tar, or add an _info.json"


def _facts(remote: Remote, name: str) -> Facts:
    found = retried(lambda: remote.facts(name))
    if found.size < 0:
        raise FetchError(f"{remote.url}/{name}: the server does not say its size")
    return found


@contextmanager
def opened_shard(job: IndexJob) -> Iterator[BinaryIO]:
    """The job's shard, open to read. A remote one is fetched into a file without a name, which goes when it is closed, or when
    this process dies. Raises FetchError."""
    if job.remote is None:
        with Path(job.path).open("rb") as file:
            yield file
        return
    folder = Path(job.folder) / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        remote_of(job.remote.root, job.remote.options).fetch(job.name, Facts(*job.remote.facts), file.fileno(), Trip())
        file.seek(0)
        yield cast(BinaryIO, file)
