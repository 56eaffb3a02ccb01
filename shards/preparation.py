"""A source to finished splits: the plan, what of it is there already, the rest made, the summary."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distill.data.index import ShardIndex
from distill.data.manifest import INDEX, MANIFEST, parse_manifest
from distill.data.order import permutation
from distill.data.remote.fetch import FetchError, read_object, retried
from distill.files import json_bytes, write_atomically
from distill.seeds import derive_seed
from shards.items import Source
from shards.jobs import PARTS, ShardJob
from shards.refusals import MAX_REFUSED
from shards.split_work import PLAN, Refused, SplitSummary, SplitWork, finish, held, make_shards, split_folders
from shards.upload import bucket, put
from shards.workers import Runner, run_jobs
from shards.writer import NOTES, QUARANTINE

INFO = "_info.json"
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


def prepare(
    source: Source,
    out: Path,
    options: Options,
    run: Runner = run_jobs,
    progress: bool = True,
    max_refused: float = MAX_REFUSED,
    upload: str = "",
) -> list[SplitSummary]:
    """Shards, index and manifest of every split of the source below `out`; what is there of the same plan is kept.

    upload: a URL to which each shard goes when it is made, and is then not kept in `out`; index and manifest go there too.

    One split alone lies in `out` itself, several in `out/NAME`. Raises Refused where `out` holds something else, OSError and
    SourceChanged where source or disk fail, and TooManyRefused where a split keeps no image, or refuses more than the share
    `max_refused` of them; then nothing that is unfinished looks finished.
    """
    works = []
    for name, folder in split_folders(source.splits, out).items():
        jobs = split_jobs(source, name, folder, options)
        split = source.splits[name]
        plan = describe_plan(source, name, options)
        root = "." if not upload else upload if folder == out else f"{upload}/{name}"
        jobs = [replace(job, upload=root) for job in jobs] if upload else jobs
        works.append(SplitWork(name, folder, plan, jobs, split.ignored, split.refused, root))
    with held(out):
        for work in works if upload else []:
            _check_bucket(work)
        summaries = []
        for work in works:
            results = make_shards(work, run, progress)
            summaries.append(finish(work, results, source.splits[work.name].class_names, max_refused))
        _write_info(out, {work.name: work.folder for work in works})
        for work in works if upload else []:
            _upload_split(work)
        if upload:
            put(bucket(upload), INFO, out / INFO)
    return summaries


def _check_bucket(work: SplitWork) -> None:
    """Raises Refused where another split lies at the place of this one, or shards that no preparation here made."""
    try:
        remote = bucket(work.root)
        found = retried(remote.listing)
        if MANIFEST in found and parse_manifest(work.root, read_object(remote, MANIFEST)).get("plan") != work.plan:
            raise Refused(f"{work.root}: holds another split; give another --out, or remove that one")
    except FetchError as error:
        raise ValueError(str(error)) from error
    begun = (work.folder / PARTS / PLAN).exists() or (work.folder / MANIFEST).exists()
    if foreign := [job.name for job in work.jobs if job.name in found and MANIFEST not in found and not begun]:
        raise Refused(
            f"{work.root}/{foreign[0]}: is there, and no preparation here says that it made it; give another --out, or"
            " remove it"
        )


def _upload_split(work: SplitWork) -> None:
    """Uploads reports and index of a finished split, and its manifest last. Raises FetchError."""
    remote = bucket(work.root)
    for name in (QUARANTINE, NOTES, INDEX, MANIFEST):
        put(remote, name, work.folder / name)


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


def _write_info(out: Path, folders: dict[str, Path]) -> None:
    """The description of the splits that timm's `wds/` reader looks for."""
    splits = {}
    for name, folder in folders.items():
        shards = ShardIndex.load(folder).shards
        splits[name] = {
            "name": name,
            "filenames": [(folder / shard.name).relative_to(out).as_posix() for shard in shards],
            "shard_lengths": [shard.samples for shard in shards],
            "num_samples": sum(shard.samples for shard in shards),
        }
    write_atomically(out / INFO, json_bytes({"name": out.name, "splits": splits}))
