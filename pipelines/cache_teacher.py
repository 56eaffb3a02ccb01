"""Computes a teacher's outputs once, for all views of all training images, so that runs read them instead.

accelerate launch pipelines/cache_teacher.py --help
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt
from pipelines.setup.launcher import end_with_launcher, exit_with

if __name__ == "__main__":
    end_at_interrupt()
    end_with_launcher()

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from distill.batch_transform import to_pixels
from distill.command_line import Parser, RequestError, command, requests, whole_number
from distill.data.faults import TooManyFaults
from distill.files import locked
from distill.losses import LOSSES
from distill.protocols import Batch
from distill.recipe import Recipe
from distill.report import say
from distill.seeds import derive_seed, seed_all
from distill.teacher_cache.codecs import CodecName, FeatureType, absent_row
from distill.teacher_cache.files import CacheError, Entries, TeacherCache, Unit, Writer, remedy, view_path
from distill.teacher_cache.teacher import Recorder, asked_regions, codec_facts
from pipelines.setup.arguments import parse
from pipelines.setup.data import Splits, build_entry_loader, build_splits, data_facts, train_images
from pipelines.setup.machine import build_accelerator, leave_together, meet
from pipelines.setup.models import Models, build_models
from pipelines.setup.teacher_cache import cache_facts, check_cacheable, live_teacher, regions_fact

SAMPLE = 4
"""Batches that are computed to say how long it will take; the first of several does not count."""
SPEAK_SECONDS = 10.0
MONTH = 30 * 24 * 60.0
"""Minutes: processes work apart and meet at the end, however long the slowest takes. A launcher ends all when one fails."""

EPILOG = """
examples:
  accelerate launch --config_file accelerate_config.yaml pipelines/cache_teacher.py \\
      --recipe pipelines/recipes/imagenet/resnet34_resnet18_sdd_dkd.yaml --train data/imagenet/train \\
      --val data/imagenet/val --views 50 --out caches/r34
      then train with --teacher.cache caches/r34 (docs/teacher_cache.md: when it pays)
  python pipelines/cache_teacher.py --out caches/r34 --verify

killed at any time, the same command goes on, on any number of processes. More --views than a cache has are added to it. Every
other option is one of the recipe's: pipelines/imagenet.py --help lists them.
exit codes: 0 done, 1 failed, 2 the request was wrong.
"""


class Asked(NamedTuple):
    """The command line."""

    recipe: Recipe
    out: Path
    views: int
    codec: CodecName
    dtype: FeatureType
    k: int
    batch: int
    unit: int


def arguments(argv: Sequence[str]) -> Asked | Path:
    """The command line; of `--verify` the cache's folder alone. Raises RequestError."""
    usage = "accelerate launch pipelines/cache_teacher.py --out DIR [--recipe FILE] [--SECTION.FIELD VALUE] [options]"
    parser = Parser(usage=usage, description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the cache's folder")
    parser.add_argument("--views", type=whole_number(1), default=50, metavar="N", help="views of each image (%(default)s)")
    parser.add_argument(
        "--codec",
        choices=get_args(CodecName),
        default="features",
        help="features: what the head reads, exact for every loss and temperature; topk: the largest logits, for temperature 1"
        " and for heads that read class tokens (%(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=get_args(FeatureType), default="fp16", help="of features; uint8 halves the bytes (%(default)s)"
    )
    parser.add_argument("--k", type=whole_number(1), default=50, metavar="N", help="of topk: logits kept (%(default)s)")
    parser.add_argument(
        "--batch", type=whole_number(1), default=256, metavar="N", help="images of one forward pass of a process (%(default)s)"
    )
    parser.add_argument(
        "--unit", type=whole_number(1), default=16384, metavar="N", help="images after which a kill loses nothing (%(default)s)"
    )
    parser.add_argument("--verify", action="store_true", help="read a finished cache and compare every file with its checksum")
    ours, rest = parser.parse_known_args(argv)
    if ours.verify:
        others = [word for word in argv if word.startswith("-") and word.split("=")[0] not in ("--verify", "--out")]
        if rest or others:
            raise RequestError(f"--verify: takes --out alone, not {(others or rest)[0]}")
        return Path(ours.out)
    recipe = parse(rest, LOSSES).recipe
    if recipe.teacher.weights == "train":
        raise RequestError(
            "teacher.weights: train; a cache is of a teacher that exists: train it with pipelines/imagenet.py, and give"
            " --teacher-weights OUT/teacher/student"
        )
    teacher = dataclasses.replace(recipe.teacher, cache=str(ours.out))
    train = dataclasses.replace(recipe.train, timeout_minutes=MONTH)
    report = dataclasses.replace(recipe.report, trackers=())
    recipe = dataclasses.replace(recipe, teacher=teacher, train=train, report=report)
    return Asked(recipe, ours.out, ours.views, ours.codec, ours.dtype, ours.k, ours.batch, ours.unit)


class PrePass:
    """The objects of one pre-pass: the whole teacher, the loader's settings and the folder that is written."""

    def __init__(self, asked: Asked, accelerator: Accelerator) -> None:
        recipe = asked.recipe
        self.asked, self.accelerator = asked, accelerator
        self.splits: Splits = build_splits(recipe, accelerator)
        data = data_facts(recipe, self.splits.train, 1)  # any number of processes will do: no batch of a training is made
        seed_all(derive_seed(recipe.seed, "initialisation"))  # as a run does: a random teacher is then the same one
        self.models: Models = build_models(recipe, self.splits.train.num_classes, data, accelerator.device)
        teacher = live_teacher(self.models)
        check_cacheable(recipe, self.models, asked.codec, self.splits.train.num_samples)
        facts: dict[str, Any] = cache_facts(recipe, self.models, self.splits, accelerator)
        with accelerator.autocast():
            facts["codec"] = codec_facts(asked.codec, teacher, asked.dtype, asked.k)
        facts |= {"regions": regions_fact(teacher.backbone), "unit": asked.unit, "batch": asked.batch}
        self.writer = Writer(asked.out, facts)
        self.recorder = Recorder(teacher, self.writer.codec, asked_regions(teacher.backbone.needs))

    def batches(self, entries: Sequence[Any]) -> Iterator[Batch]:
        """The entries' batches, on the device."""
        asked = self.asked
        images = train_images(asked.recipe, self.models)
        loader = build_entry_loader(asked.recipe, self.splits, images, entries, asked.batch, self.accelerator)
        try:
            yield from loader.epoch(0)
        finally:
            loader.close()

    def record(self, batch: Batch, wanted: NDArray[np.int64]) -> tuple[NDArray[np.void], list[int]]:
        """The rows of the samples `wanted`, and those of them that could not be read."""
        rows = np.repeat(absent_row(self.writer.codec), len(wanted))
        found = batch.sample_ids.cpu().numpy()
        if len(found):
            with self.accelerator.autocast():
                pixels = to_pixels(batch.images, self.asked.recipe.train.channels_last)
                try:
                    rows[np.searchsorted(wanted, found)] = self.recorder.record(pixels, batch.labels)
                except ValueError as error:
                    raise CacheError(f"{self.asked.out}: {error}") from None
        return rows, np.setdiff1d(wanted, found).tolist()

    def fill(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Computes and writes units, one after the other; each is given back once it is on the disk."""
        batches = self.batches(entries := Entries(units, self.asked.batch))
        place = 0
        for unit in units:
            crc32, absent = 0, []
            for _ in range(unit.first, unit.last, self.asked.batch):
                wanted = entries[place][1]
                rows, missing = self.record(next(batches), wanted)
                self.writer.write(unit, int(wanted[0]), rows)
                crc32 = zlib.crc32(rows.tobytes(), crc32)
                absent += missing
                place += 1
            self.writer.mark(unit, crc32, absent)
            yield unit
        batches.close()  # type: ignore[attr-defined]

    def estimate(self, views: int, units: Sequence[Unit]) -> list[str]:
        """What it will cost and when that pays, measured on a few batches, in lines for people. Every process measures."""
        n, batch, world = self.splits.train.num_samples, self.asked.batch, self.accelerator.num_processes
        starts = range(0, min(n, SAMPLE * batch), batch)
        entries = [(0, np.arange(first, min(n, first + batch))) for first in starts]
        whole, alone, images, begin = 0.0, 0.0, 0, time.perf_counter()
        for number, each in enumerate(self.batches(entries)):
            start = time.perf_counter()
            self.record(each, entries[number][1])
            end = time.perf_counter()
            if number or len(entries) == 1:
                whole, alone, images = whole + end - begin, alone + end - start, images + len(each.labels)
            begin = end
        if not images:
            return ["nothing can be said of the time: of the first images none could be read"]
        left, codec = sum(unit.last - unit.first for unit in units), self.writer.codec
        longest = sum(unit.last - unit.first for unit in units[::world])  # the share of the first process
        rate = images / whole * left / longest
        described = ", ".join(f"{key} {value}" for key, value in codec.facts.items() if key != "name")
        epochs = math.ceil(views * whole / alone)
        one = self.asked.recipe.train.epochs
        return [
            f"codec {codec.facts['name']} ({described}): {codec.row.itemsize:,} bytes an image,"
            f" {self.writer.view_bytes / 1e9:.3g} GB a view, {views * self.writer.view_bytes / 1e9:.4g} GB for {views} views",
            f"{left:,} of {views * n:,} entries to compute: {left / rate / 3600:.2f} hours at {rate:,.0f} images/s on"
            f" {world} process{'es' if world > 1 else ''}, measured on {images} images of each",
            f"it pays from {epochs} epochs on, of all runs that read it together ({epochs / one:.1f} times {one}, the"
            " recipe's), where the loader keeps up with steps without a teacher"
            f" (an entry takes {1000 * whole / images:.2f} ms here, the teacher in it {1000 * alone / images:.2f} ms)",
        ]


@contextmanager
def claimed(work: PrePass) -> Iterator[int]:
    """Makes this launch the only one that writes to the folder, for as long as the context is open; gives the cache's number of
    views. Raises RequestError on every process where that cannot be, CacheError where the disk is too small."""
    lock: IO[str] | None = None

    def begin() -> int:
        nonlocal lock
        try:
            lock = _locked(work.asked.out)
            return work.writer.begin(work.asked.views)
        except (ValueError, OSError) as error:
            raise RequestError(f"--out: {error}") from None

    views = of_main_process(work.accelerator, begin)
    with lock or nullcontext():
        yield views


def _locked(folder: Path) -> IO[str]:
    try:
        return locked(folder)
    except BlockingIOError:
        raise RequestError(f"another process is writing to {folder}; wait for it, or give another folder") from None


def of_main_process(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What `act` gives on the main process, on every process; what it raises, likewise."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = act()
        except Exception as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def show(work: PrePass, mine: Sequence[Unit], missing: int) -> None:
    """Fills the units of this process; the main process says how far it is, which is how far all are with their `missing`
    entries."""
    total, done = sum(unit.last - unit.first for unit in mine), 0
    begin = spoke = time.monotonic()
    for unit in work.fill(mine):
        done += unit.last - unit.first
        now = time.monotonic()
        if now - spoke > SPEAK_SECONDS or done == total:
            spoke, rate = now, done / (now - begin)
            written = missing * done / total * work.writer.codec.row.itemsize / 1e9
            say(
                work.accelerator,
                f"view {unit.view}, {done / total:.1%}, about {written:.3g} GB written, {missing / total * rate:,.0f} images/s,"
                f" {(total - done) / rate / 60:.0f} minutes to go",
            )


def make(asked: Asked) -> None:
    """Makes the cache, or what is missing of it. The order:

    1. what cannot be cached is refused; 2. the folder is claimed; 3. the cost is said; 4. the disk space is taken; 5. units are
    computed, each process its share; 6. the files are hashed, and the manifest says that the cache is whole.
    """
    accelerator = build_accelerator(asked.recipe)
    rank, world = accelerator.process_index, accelerator.num_processes
    with requests():
        work = PrePass(asked, accelerator)
    with claimed(work) as views:
        if work.writer.whole(views):
            say(accelerator, f"{asked.out}: this cache is finished, with {views} views")
            return
        missing = work.writer.missing(views)
        meet()  # nobody marks a unit before all have looked
        if missing:
            for line in work.estimate(views, missing):
                say(accelerator, line)
            of_main_process(accelerator, lambda: work.writer.allocate(views))
            show(work, missing[rank::world], sum(unit.last - unit.first for unit in missing))
        meet()
        hashed = {view: work.writer.hashed(view) for view in range(rank, views, world)}
        everyone = dict(pair for each in gather_object([hashed]) for pair in each.items())
        of_main_process(accelerator, lambda: finish(work, [everyone[view] for view in range(views)]))
    say(
        accelerator,
        f"{asked.out}: {views} views, {views * work.writer.view_bytes / 1e9:.4g} GB; train with --teacher.cache {asked.out}",
    )


def finish(work: PrePass, hashed: Sequence[tuple[str, list[Unit]]]) -> None:
    """Says that the cache is whole. CacheError where rows are not what was written: they are then missing again."""
    if damaged := [unit for _, units in hashed for unit in units]:
        work.writer.forget(damaged)
        names = ", ".join(sorted({view_path(work.asked.out, unit.view).name for unit in damaged}))
        raise CacheError(
            f"{work.asked.out}: rows of {names} changed since they were written; the same command makes them again"
            f" ({len(damaged)} units)"
        )
    work.writer.finish(len(hashed), [sha256 for sha256, _ in hashed])


def verify(folder: Path) -> None:
    """Reads a whole cache. Raises RequestError that names the views whose files are not what the manifest says."""
    state = PartialState(cpu=True)  # files are all that is looked at
    with requests():
        cache = TeacherCache.open(folder)
    mine = [view for view in range(state.process_index, cache.views, state.num_processes) if cache.damaged(view)]
    damaged = sorted(view for each in gather_object([mine]) for view in each)
    if damaged:
        files = ", ".join(view_path(folder, view).name for view in damaged)
        raise RequestError(f"{folder}: {files} changed since the cache was made; {remedy(folder, damaged)}")
    if state.is_main_process:
        absent = f"; {len(cache.absent)} samples could not be read" if cache.absent else ""
        print(f"{folder}: {cache.views} views are as they were made{absent}")


@command
def main(argv: Sequence[str]) -> None:
    """The cache that the command line asks for."""
    asked = arguments(argv)
    try:
        if isinstance(asked, Path):
            verify(asked)
        else:
            make(asked)
    except (OSError, TooManyFaults) as error:
        raise CacheError(f"--out {asked if isinstance(asked, Path) else asked.out}: {error}") from error
    leave_together(meet)


if __name__ == "__main__":
    exit_with(main)
