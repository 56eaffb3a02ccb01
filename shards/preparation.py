"""A source to finished splits: the plan, what of it is there already, the rest made, the summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from distill.data.index import MANIFEST, ShardIndex, read_manifest
from distill.data.order import permutation
from distill.files import json_bytes, locked, write_atomically
from distill.seeds import derive_seed
from shards.items import Source
from shards.jobs import PARTS, IndexJob, Job, ShardJob, ShardResult, read_marker
from shards.refusals import MAX_REFUSED, TooManyRefused, check_refused, read_refusals
from shards.renew import renew_split
from shards.splits import find_splits
from shards.workers import Runner, run_jobs
from shards.writer import QUARANTINE, discard, finish_split, read_records, tidy, write_reports

INFO = "_info.json"
PLAN = "plan.json"
SHARD_SIZE = 1250
"""Samples a shard where nothing is asked for: about 140 MB of ImageNet, and its usual 1,024 shards."""


@dataclass(frozen=True)
class Options:
    """The options of a preparation: all that changes the shards beside the source."""

    shards: int | None = None
    """Shards of the training split; the others get as many as their size asks for, at least one."""
    shard_size: int = SHARD_SIZE
    """Samples a shard where `shards` is not given."""
    seed: int = 0
    """Seed of the shuffle."""
    resize_short: int | None = None
    """Shrinks training images whose shorter side is larger."""
    quality: int = 90
    """JPEG quality of shrunk images."""
    limit: int | None = None
    """Largest number of samples of a split; it takes the first of the shuffle."""


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


def prepare(
    source: Source,
    out: Path,
    options: Options,
    run: Runner = run_jobs,
    progress: bool = True,
    max_refused: float = MAX_REFUSED,
) -> list[SplitSummary]:
    """Shards, index and manifest of every split of the source below `out`; what is there of the same plan is kept.

    One split alone lies in `out` itself, several in `out/NAME`. Raises Refused where `out` holds something else, OSError and
    SourceChanged where source or disk fail, and TooManyRefused where a split keeps no image, or refuses more than the share
    `max_refused` of them; then nothing that is unfinished looks finished.
    """
    works = []
    for name, folder in split_folders(source.splits, out).items():
        jobs = split_jobs(source, name, folder, options)
        split = source.splits[name]
        plan = describe_plan(source, name, options)
        works.append(SplitWork(name, folder, plan, jobs, split.ignored, split.refused))
    with _held(out):
        summaries = []
        for work in works:
            results = _make(work, run, progress)
            summaries.append(_finish(work, results, source.splits[work.name].class_names, max_refused))
        _write_info(out, {work.name: work.folder for work in works})
    return summaries


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
    source: Path,
    out: Path,
    reading: Reading = Reading(),  # noqa: B008 (a tuple of constants)
    *,
    run: Runner = run_jobs,
    progress: bool = True,
    max_refused: float = MAX_REFUSED,
) -> list[SplitSummary]:
    """Index and manifest below `out` for existing WebDataset shards below `source`, which are read and not changed.

    Raises as `prepare` does, and BrokenTar for a shard that cannot be walked to its end.
    """
    if reading.renumber and reading.class_names is not None:
        raise ValueError("--renumber with --class-names: the names have their numbers already; leave one out")
    splits = find_splits(source, reading.splits)
    works = []
    for name, folder in split_folders(splits, out).items():
        names = [_relative(path, source) for path in splits[name]]
        jobs = [_index_job(folder, number, names[number], path, reading) for number, path in enumerate(splits[name])]
        plan = _existing_plan(source, names, splits[name], reading)
        works.append(SplitWork(name, folder, plan, jobs, root=str(source.resolve())))
    with _held(out):
        made = {work.name: _make(work, run, progress) for work in works}
        class_names = reading.class_names or _numbered(works, made, reading.renumber)
        kept = any(shard.shard.samples for results in made.values() if results for shard in results.results)
        if len(class_names) == 1 and kept and not reading.one_class:
            raise Refused(
                f"{source}: one class, all labels are {class_names[0]}; give their field with --label or --json-label if it is"
                " another, or --one-class"
            )
        return [_finish(work, made[work.name], class_names, max_refused, reading.renumber) for work in works]


def _relative(shard: Path, source: Path) -> str:
    """The shard's name below the source's folder; its whole path where an `_info.json` names one elsewhere."""
    return shard.relative_to(source).as_posix() if shard.is_relative_to(source) else str(shard)


def _index_job(folder: Path, number: int, name: str, path: Path, reading: Reading) -> IndexJob:
    names = None if reading.class_names is None else tuple(reading.class_names)
    return IndexJob(str(folder), number, name, str(path), reading.json_label, reading.label, reading.image, names)


def _existing_plan(source: Path, names: Sequence[str], shards: Sequence[Path], reading: Reading) -> dict[str, Any]:
    stats = [path.stat() for path in shards]
    asked = {"image": reading.image, "label": reading.label, "renumber": reading.renumber or None}
    return {
        "source": "wds",
        "origin": {
            "folder": source.name,
            "json_label": reading.json_label,
            **{key: value for key, value in asked.items() if value is not None},
        },
        "items": sha256(repr([(name, stat.st_size) for name, stat in zip(names, stats, strict=True)]).encode()).hexdigest(),
        "source_times": sha256(repr([stat.st_mtime_ns for stat in stats]).encode()).hexdigest(),
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


def split_folders(splits: Collection[str], out: Path) -> dict[str, Path]:
    """The folder of each split."""
    return {name: out if len(splits) == 1 else out / name for name in splits}


def split_jobs(source: Source, name: str, folder: Path, options: Options) -> list[ShardJob]:
    """The jobs of a split: a seeded shuffle, cut into shards whose sizes differ by at most one."""
    split = source.splits[name]
    order = permutation(derive_seed(options.seed, "shards", len(split.items)), len(split.items))
    order = order[: options.limit]
    count = shard_count(source, name, options)
    width = max(4, len(str(count - 1)))
    edges = [number * len(order) // count for number in range(count + 1)]
    resize = options.resize_short if name == "train" else None  # evaluation images are never re-encoded
    return [
        ShardJob(
            folder=str(folder),
            number=number,
            name=f"{name}-{number:0{width}d}.tar",
            items=[split.items[row] for row in order[edges[number] : edges[number + 1]]],
            resize_short=resize,
            quality=options.quality,
        )
        for number in range(count)
    ]


def shard_count(source: Source, name: str, options: Options) -> int:
    """Shards of a split: as asked for training, the same samples a shard for the other splits, never an empty one."""
    sizes = {key: min(len(split.items), options.limit or len(split.items)) for key, split in source.splits.items()}
    if options.shards is None:
        return -(-sizes[name] // options.shard_size)
    largest = next(iter(sizes)) if "train" not in sizes else "train"
    wanted = -(-options.shards * sizes[name] // sizes[largest])
    return max(1, min(wanted, sizes[name]))


class Made(NamedTuple):
    """The shards of a split, in order, before it has an index."""

    results: Sequence[ShardResult]
    now: int
    """Shards made now; the others were there."""


def _make(work: SplitWork, run: Runner, progress: bool) -> Made | None:
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


def _finish(
    work: SplitWork, made: Made | None, class_names: Sequence[str], max_refused: float, renumber: bool = False
) -> SplitSummary:
    """Index and manifest of a split whose shards are made, unless too many of its images are refused.

    With `renumber` the labels are numbers among `class_names`, and become their places.
    """
    folder = work.folder
    if made is None:
        return _summary(work.name, folder, made=0)
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
    }
    records = read_records(folder, made.results)
    if renumber:
        records["label"] = np.searchsorted(np.array(class_names, np.int64), records["label"])
    finish_split(folder, made.results, records, class_names, extra, work.root)
    return _summary(work.name, folder, made=made.now)


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


def describe_plan(source: Source, name: str, options: Options) -> dict[str, Any]:
    """The plan of a split: all that determines its shards, and the times of the source files when they were made."""
    split = source.splits[name]
    return {
        "source": source.kind,
        "origin": source.origin,
        "items": split.digest(),
        "source_times": split.stamp(),
        "num_items": len(split.items),
        "num_shards": shard_count(source, name, options),
        **{key: value for key, value in asdict(options).items() if key not in ("shards", "shard_size")},
    }


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


def _held(out: Path) -> IO[str]:
    """The lock of `out`: one preparation at a time writes below it."""
    try:
        return locked(out)
    except BlockingIOError as error:
        raise Refused(f"{out}: another preparation is writing there; wait for it, or give another --out") from error


def _write_info(out: Path, folders: dict[str, Path]) -> None:
    """The description of the splits that timm's `wds/` reader looks for."""
    splits = {}
    for name, folder in folders.items():
        shards = ShardIndex.open(folder).shards
        splits[name] = {
            "name": name,
            "filenames": [(folder / shard.name).relative_to(out).as_posix() for shard in shards],
            "shard_lengths": [shard.samples for shard in shards],
            "num_samples": sum(shard.samples for shard in shards),
        }
    write_atomically(out / INFO, json_bytes({"name": out.name, "splits": splits}))


def _summary(name: str, folder: Path, made: int) -> SplitSummary:
    index = ShardIndex.open(folder)
    counts = np.bincount(index.records["label"], minlength=index.num_classes)
    return SplitSummary(
        name=name,
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
