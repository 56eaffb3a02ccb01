"""A source to finished splits: the plan, what of it is there already, the rest made, the summary."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from distill.data.index import MANIFEST, ShardIndex, read_manifest
from distill.data.order import permutation
from distill.files import json_bytes, locked, write_atomically
from distill.seeds import derive_seed
from shards.existing import find_splits
from shards.items import Source
from shards.jobs import PARTS, IndexJob, Job, ShardJob, ShardResult, read_marker
from shards.renew import renew_split
from shards.workers import Runner, run_jobs
from shards.writer import finish_split, tidy

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
    shards: int
    bytes: int
    quarantined: int
    noted: int
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
    class_names: Sequence[str] | None
    """Names by class number; None stands for the numbers up to the largest label."""
    ignored: int = 0
    root: str = "."


def prepare(source: Source, out: Path, options: Options, run: Runner = run_jobs, progress: bool = True) -> list[SplitSummary]:
    """Shards, index and manifest of every split of the source below `out`; what is there of the same plan is kept.

    One split alone lies in `out` itself, several in `out/NAME`. Raises Refused where `out` holds something else, OSError and
    SourceChanged where source or disk fail; then nothing that is unfinished looks finished.
    """
    works = []
    for name, folder in split_folders(source.splits, out).items():
        jobs = split_jobs(source, name, folder, options)
        split = source.splits[name]
        works.append(SplitWork(name, folder, describe_plan(source, name, options), jobs, split.class_names, split.ignored))
    with _held(out):
        summaries = [_complete(work, run, progress) for work in works]
        _write_info(out, {work.name: work.folder for work in works})
    return summaries


def index_existing(
    source: Path,
    out: Path,
    *,
    json_label: str | None = None,
    class_names: Sequence[str] | None = None,
    run: Runner = run_jobs,
    progress: bool = True,
) -> list[SplitSummary]:
    """Index and manifest below `out` for existing WebDataset shards below `source`, which are read and not changed.

    Raises as `prepare` does, and BrokenTar for a shard that cannot be walked to its end.
    """
    splits = find_splits(source)
    works = []
    for name, folder in split_folders(splits, out).items():
        names = [path.relative_to(source).as_posix() for path in splits[name]]
        stats = [path.stat() for path in splits[name]]
        plan = {
            "source": "wds",
            "origin": {"folder": source.name, "json_label": json_label},
            "items": sha256(repr([(name, stat.st_size) for name, stat in zip(names, stats, strict=True)]).encode()).hexdigest(),
            "source_times": sha256(repr([stat.st_mtime_ns for stat in stats]).encode()).hexdigest(),
            "num_shards": len(names),
            "class_names": None if class_names is None else sha256(repr(list(class_names)).encode()).hexdigest(),
        }
        classes = None if class_names is None else len(class_names)
        jobs = [
            IndexJob(str(folder), number, names[number], str(path), json_label, classes)
            for number, path in enumerate(splits[name])
        ]
        works.append(SplitWork(name, folder, plan, jobs, class_names, root=str(source.resolve())))
    with _held(out):
        return [_complete(work, run, progress) for work in works]


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


def _complete(work: SplitWork, run: Runner, progress: bool) -> SplitSummary:
    """Makes what is missing of a split, then its index and manifest."""
    folder = work.folder
    if (folder / MANIFEST).exists():
        plan = read_manifest(folder).get("plan")
        _check_same_plan(plan if isinstance(plan, dict) else {}, work.plan, folder)
        renew_split(folder, progress)
        tidy(folder)
        return _summary(work.name, folder, made=0)
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    _claim(folder, work)
    found = {job.number: read_marker(job) for job in work.jobs}
    there = [result for result in found.values() if result is not None]
    missing = [job for job in work.jobs if found[job.number] is None]
    results = there + _run(missing, there, work, run, progress)
    extra = {"split": work.name, "plan": work.plan, "tools": _tool_versions(), "source_files_ignored": work.ignored}
    finish_split(folder, results, work.class_names, extra, work.root)
    return _summary(work.name, folder, made=len(missing))


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
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if not different:
        return
    of_source = {"items", "source_times", "num_items"} & set(different)
    what = "it was made from another source, or the source changed since" if of_source else "it was made with other settings"
    told = ", ".join(f"{key} {_short(found.get(key))} there, {_short(wanted[key])} now" for key in different)
    raise Refused(f"{folder}: {what} ({told}); give another --out, or remove that folder to prepare it again")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def _claim(folder: Path, work: SplitWork) -> None:
    """Writes down what is being made here, or checks that an unfinished preparation was making the same."""
    path = folder / PARTS / PLAN
    if path.exists():
        _check_same_plan(json.loads(path.read_text()), work.plan, folder)
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
    return SplitSummary(
        name=name,
        folder=folder,
        samples=index.num_samples,
        shards=len(index.shards),
        bytes=sum(shard.bytes for shard in index.shards),
        quarantined=index.manifest["quarantined"],
        noted=index.manifest["noted"],
        made=made,
    )


def _tool_versions() -> dict[str, str]:
    return {name: version(name) for name in ("numpy", "pillow")}
