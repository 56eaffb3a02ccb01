"""Computes a teacher's outputs once, for all views of all training images, so that runs read them instead.

accelerate launch pipelines/cache_teacher.py --help
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt
from pipelines.setup.launcher import end_with_launcher, exit_with

if __name__ == "__main__":
    end_at_interrupt()
    end_with_launcher()

from accelerate import PartialState
from accelerate.utils import gather_object

from distill.command_line import Parser, RequestError, command, requests, whole_number
from distill.data.faults import TooManyFaults
from distill.losses import LOSSES
from distill.report import say
from distill.teacher_cache.codecs import CodecName, FeatureType
from distill.teacher_cache.files import CacheError, TeacherCache, remedy, view_path
from distill.teacher_cache.writer import Unit
from pipelines.setup.arguments import parse
from pipelines.setup.machine import build_accelerator, leave_together, meet, of_main_process
from pipelines.setup.prepass import Asked, PrePass, Speed, claimed, finish

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


def cost(work: PrePass, views: int, units: Sequence[Unit], speed: Speed) -> list[str]:
    """What the units will cost and when that pays, in lines."""
    if not speed.images:
        return ["nothing can be said of the time: of the first images none could be read"]
    n, world, codec = work.splits.train.num_samples, work.accelerator.num_processes, work.writer.codec
    left, longest = (sum(unit.last - unit.first for unit in some) for some in (units, units[::world]))
    rate = speed.images / speed.whole * left / longest  # the first process has the longest share
    described = ", ".join(f"{key} {value}" for key, value in codec.facts.items() if key != "name")
    epochs, one = math.ceil(views * speed.whole / speed.alone), work.asked.recipe.train.epochs
    entry, teacher = (1000 * seconds / speed.images for seconds in (speed.whole, speed.alone))
    return [
        f"codec {codec.facts['name']} ({described}): {codec.row.itemsize:,} bytes an image,"
        f" {work.writer.view_bytes / 1e9:.3g} GB a view, {views * work.writer.view_bytes / 1e9:.4g} GB for {views} views",
        f"{left:,} of {views * n:,} entries to compute: {left / rate / 3600:.2f} hours at {rate:,.0f} images/s on"
        f" {world} process{'es' if world > 1 else ''}, measured on {speed.images} images of each",
        f"it pays from {epochs} epochs on, of all runs that read it together ({epochs / one:.1f} times {one}, the"
        " recipe's), where the loader keeps up with steps without a teacher"
        f" (an entry takes {entry:.2f} ms here, the teacher in it {teacher:.2f} ms)",
    ]


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
            for line in cost(work, views, missing, work.measure()):
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
