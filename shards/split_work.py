"""The work on one split, whatever its shards come from: what of it is there already, the rest made, the summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from distill.data.index import ShardIndex
from distill.data.manifest import MANIFEST, read_manifest
from distill.data.remote.buckets import store_options
from distill.data.remote.urls import is_url
from distill.files import json_bytes, locked, write_atomically
from shards.jobs import PARTS, Job, ShardJob, ShardResult, read_marker
from shards.refusals import TooManyRefused, check_refused, read_refusals
from shards.renew import renew_split
from shards.workers import Runner
from shards.writer import QUARANTINE, discard, finish_split, read_records, tidy, write_reports

PLAN = "plan.json"


class Refused(ValueError):
    """The request does not fit what lies in the output folder; the text says what and what to do."""


@dataclass(frozen=True)
class SplitSummary:
    """The counts of a finished split."""

    name: str
    folder: Path
    samples: int
    class_names: Sequence[str]
    empty_classes: Sequence[str]
    """Names of the classes that have no image here."""
    shard_names: Sequence[str]
    bytes: int
    refused: Sequence[Mapping[str, Any]]
    """The entries of `quarantine.jsonl`."""
    noted: int
    ignored: Mapping[str, int]
    """What was passed over, and how many of it."""
    made: int
    """Shards made now; the others were there."""


@dataclass(frozen=True)
class SplitWork:
    """All that is to be done for one split."""

    name: str
    folder: Path
    plan: dict[str, Any]
    """All that determines the result; it is kept in the manifest and compared when a preparation is started again."""
    jobs: Sequence[Job]
    ignored: Mapping[str, int] = field(default_factory=dict)
    refused: Sequence[Mapping[str, str]] = ()
    root: str = "."


class Made(NamedTuple):
    """The shards of a split, in order, before it has an index."""

    results: Sequence[ShardResult]
    now: int
    """Shards made now; the others were there."""


def split_folders(splits: Collection[str], out: Path) -> dict[str, Path]:
    """The folder of each split."""
    return {name: out if len(splits) == 1 else out / name for name in splits}


def make_shards(work: SplitWork, run: Runner, progress: bool) -> Made | None:
    """Makes what is missing of a split's shards; None where the split is finished."""
    folder = work.folder
    if (folder / MANIFEST).exists():
        plan = read_manifest(folder).get("plan")
        _check_same_plan(plan if isinstance(plan, dict) else {}, work.plan, folder)
        renew_split(folder, progress)
        tidy(folder)
        return None
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    _claim(folder, work)
    found = {job.number: read_marker(job) for job in work.jobs}
    there = [result for result in found.values() if result is not None]
    missing = [job for job in work.jobs if found[job.number] is None]
    results = there + _run(missing, there, work, run, progress)
    return Made(sorted(results, key=lambda result: result.number), len(missing))


def finish(
    work: SplitWork, made: Made | None, class_names: Sequence[str], max_refused: float, renumber: bool = False
) -> SplitSummary:
    """Index and manifest of a split whose shards are made, unless too many of its images are refused.

    With `renumber` the labels are numbers among `class_names`, and become their places.
    """
    folder = work.folder
    if made is None:
        return _summary(work, made=0)
    quarantine, notes = write_reports(folder, made.results, work.refused)
    kept = sum(result.shard.samples for result in made.results)
    try:
        check_refused(work.name, kept, quarantine, max_refused, folder / QUARANTINE)
    except TooManyRefused:
        if not kept:
            discard(folder, work.jobs)
        raise
    ignored = sum((Counter(result.ignored) for result in made.results), Counter(work.ignored))
    extra = {
        "split": work.name,
        "plan": work.plan,
        "tools": _tool_versions(),
        "source_files_ignored": ignored.total(),
        "ignored": dict(ignored),
        "quarantined": len(quarantine),
        "noted": len(notes),
        **({"store": options} if (options := store_options(work.root)) else {}),
    }
    records = read_records(folder, made.results)
    if renumber:
        records["label"] = np.searchsorted(np.array(class_names, np.int64), records["label"])
    finish_split(folder, made.results, records, class_names, extra, work.root)
    return _summary(work, made=made.now)


def _run(
    missing: Sequence[Job], there: Sequence[ShardResult], work: SplitWork, run: Runner, progress: bool
) -> list[ShardResult]:
    """Runs jobs under a progress bar; it counts images where their number is known before, else shards."""
    counted = all(isinstance(job, ShardJob) for job in work.jobs)
    total = sum(len(job.items) if isinstance(job, ShardJob) else 1 for job in work.jobs)
    initial = sum(result.read_samples if counted else 1 for result in there)
    results, read_bytes = [], 0
    unit = "image" if counted else "shard"
    with tqdm(total=total, initial=initial, desc=f"{work.name:6s}", unit=unit, unit_scale=counted, disable=not progress) as bar:
        for result in run(missing):
            results.append(result)
            read_bytes += result.read_bytes
            rate = read_bytes / 1e6 / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{rate:.1f} MB/s, {len(there) + len(results)}/{len(work.jobs)} shards", refresh=False)
            bar.update(result.read_samples if counted else 1)
    return results


def _check_same_plan(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    origins = {**(found.get("origin") or {})}, wanted["origin"]
    found, wanted = found | origins[0], wanted | origins[1]
    keys = [key for key in (*wanted, *origins[0]) if key != "origin"]
    different = [key for key in dict.fromkeys(keys) if found.get(key) != wanted.get(key)]
    if not different:
        return
    of_source = {"items", "source_times", "num_items"} & set(different) and "class_order" not in different
    what = "it was made from another source, or the source changed since" if of_source else "it was made with other settings"
    told = ", ".join(f"{key} {_short(found.get(key))} there, {_short(wanted.get(key))} now" for key in different)
    raise Refused(f"{folder}: {what} ({told}); give another --out, or remove that folder to prepare it again")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def _claim(folder: Path, work: SplitWork) -> None:
    """Writes down what is being made here, or checks that an unfinished preparation was making the same."""
    path = folder / PARTS / PLAN
    if path.exists() and (found := json.loads(path.read_text())) != work.plan:
        if any(isinstance(job, ShardJob) for job in work.jobs):
            _check_same_plan(found, work.plan, folder)
        else:  # only index rows are lost; whoever mends a shard or an option gives the command again
            discard(folder, work.jobs)
            path.parent.mkdir()
    if path.exists():
        return
    foreign = [job.name for job in work.jobs if isinstance(job, ShardJob) and (folder / job.name).exists()]
    if foreign:
        raise Refused(
            f"{folder / foreign[0]}: is there, and no preparation says that it made it; give another --out, or remove it"
        )
    write_atomically(path, json_bytes(work.plan))


def held(out: Path) -> IO[str]:
    """The lock of `out`: one preparation at a time writes below it."""
    try:
        return locked(out)
    except BlockingIOError as error:
        raise Refused(f"{out}: another preparation is writing there; wait for it, or give another --out") from error


def _summary(work: SplitWork, made: int) -> SplitSummary:
    folder = work.folder
    index = ShardIndex.load(folder) if is_url(work.root) else ShardIndex.open(folder)
    counts = np.bincount(index.records["label"], minlength=index.num_classes)
    return SplitSummary(
        name=work.name,
        folder=folder,
        samples=index.num_samples,
        class_names=index.class_names,
        empty_classes=[index.class_names[label] for label in np.flatnonzero(counts == 0)],
        shard_names=[shard.name for shard in index.shards],
        bytes=sum(shard.bytes for shard in index.shards),
        refused=read_refusals(folder / QUARANTINE),
        noted=index.manifest["noted"],
        ignored=index.manifest.get("ignored", {}),
        made=made,
    )


def _tool_versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "pillow")}
