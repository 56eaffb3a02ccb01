"""Index and manifest for WebDataset shards that exist already: they are read and not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill.data.index import ShardIndex
from shards.jobs import IndexJob, RemoteShard
from shards.refusals import MAX_REFUSED
from shards.remote import find_remote_splits
from shards.split_work import Made, Refused, SplitSummary, SplitWork, finish, held, make_shards, split_folders
from shards.splits import find_splits
from shards.workers import Runner, run_jobs
from shards.writer import read_records


class Reading(NamedTuple):
    """The way in which existing shards are read."""

    splits: Mapping[str, str] = {}
    """Split -> pattern of its shards' names; empty where their names say it."""
    image: str | None = None
    """Field of the image; None looks for one of the usual names, here and below."""
    label: str | None = None
    json_label: str | None = None
    """Place of the label in the .json, with dots between its parts."""
    class_names: Sequence[str] | None = None
    one_class: bool = False
    """Takes shards whose labels are all 0, and one class."""
    renumber: bool = False
    """Numbers the labels that occur from 0 on, in their order."""


def index_existing(
    source: Path | str,
    out: Path,
    reading: Reading = Reading(),  # noqa: B008 (a tuple of constants)
    *,
    run: Runner = run_jobs,
    progress: bool = True,
    max_refused: float = MAX_REFUSED,
) -> list[SplitSummary]:
    """Index and manifest below `out` for existing WebDataset shards below `source`, which are read and not changed.

    A source that is a URL is read once, shard after shard, and nothing of it is kept but index and manifest.

    Raises as `prepare` does, and BrokenTar for a shard that cannot be walked to its end.
    """
    if reading.renumber and reading.class_names is not None:
        raise ValueError("--renumber with --class-names: the names have their numbers already; leave one out")
    works = _remote_works(source, out, reading) if isinstance(source, str) else _local_works(source, out, reading)
    with held(out):
        made = {work.name: make_shards(work, run, progress) for work in works}
        class_names = reading.class_names or _numbered(works, made, reading.renumber)
        kept = any(shard.shard.samples for results in made.values() if results for shard in results.results)
        if len(class_names) == 1 and kept and not reading.one_class:
            raise Refused(
                f"{source}: one class, all labels are {class_names[0]}; give their field with --label or --json-label if it is"
                " another, or --one-class"
            )
        return [finish(work, made[work.name], class_names, max_refused, reading.renumber) for work in works]


def _local_works(source: Path, out: Path, reading: Reading) -> list[SplitWork]:
    splits = find_splits(source, reading.splits)
    works = []
    for name, folder in split_folders(splits, out).items():
        names = [_relative(path, source) for path in splits[name]]
        jobs = [_index_job(folder, number, names[number], path, reading) for number, path in enumerate(splits[name])]
        stats = [path.stat() for path in splits[name]]
        plan = _existing_plan(
            source.name, names, [stat.st_size for stat in stats], [stat.st_mtime_ns for stat in stats], reading
        )
        works.append(SplitWork(name, folder, plan, jobs, root=str(source.resolve())))
    return works


def _remote_works(url: str, out: Path, reading: Reading) -> list[SplitWork]:
    found = find_remote_splits(url, reading.splits)
    works = []
    for name, folder in split_folders(found.splits, out).items():
        names = found.splits[name]
        facts = [found.facts[shard] for shard in names]
        jobs = [
            replace(
                _index_job(folder, number, shard, f"{found.root}/{shard}", reading),
                remote=RemoteShard(found.root, found.options, facts[number]),
            )
            for number, shard in enumerate(names)
        ]
        tags = [(fact.etag, fact.version) for fact in facts]
        plan = _existing_plan(found.root, names, [fact.size for fact in facts], tags, reading)
        works.append(SplitWork(name, folder, plan, jobs, root=found.root))
    return works


def _relative(shard: Path, source: Path) -> str:
    """The shard's name below the source's folder; its whole path where an `_info.json` names one elsewhere."""
    return shard.relative_to(source).as_posix() if shard.is_relative_to(source) else str(shard)


def _index_job(folder: Path, number: int, name: str, path: Path | str, reading: Reading) -> IndexJob:
    names = None if reading.class_names is None else tuple(reading.class_names)
    return IndexJob(str(folder), number, name, str(path), reading.json_label, reading.label, reading.image, names)


def _existing_plan(
    place: str, names: Sequence[str], sizes: Sequence[int], times: Sequence[Any], reading: Reading
) -> dict[str, Any]:
    """times: of what was there; of remote shards, their ETags and versions."""
    asked = {"image": reading.image, "label": reading.label, "renumber": reading.renumber or None}
    return {
        "source": "wds",
        "origin": {
            "folder": place,
            "json_label": reading.json_label,
            **{key: value for key, value in asked.items() if value is not None},
        },
        "items": sha256(repr(list(zip(names, sizes, strict=True))).encode()).hexdigest(),
        "source_times": sha256(repr(list(times)).encode()).hexdigest(),
        "num_shards": len(names),
        "class_names": None if reading.class_names is None else sha256(repr(list(reading.class_names)).encode()).hexdigest(),
    }


def _numbered(works: Sequence[SplitWork], made: Mapping[str, Made | None], renumber: bool) -> list[str]:
    """The labels of all splits as the names of their classes: all numbers up to the largest, or those that occur."""
    labels = {0} if not renumber else set()
    for work in works:
        results = made[work.name]
        if results is None:  # a finished split has the names of all splits, and its own numbers
            return list(ShardIndex.load(work.folder).class_names)
        labels |= set(np.unique(read_records(work.folder, results.results)["label"]).tolist())
    return [str(label) for label in (sorted(labels) if renumber else range(max(labels) + 1))]
