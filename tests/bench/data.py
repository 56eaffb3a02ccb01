#!/usr/bin/env python
"""Images a second of the data path beside its alternatives, the cost of a start at ImageNet's scale, and reads from disk.

Every measurement runs in a process of its own, the pipelines take turns, and the figure to trust on a shared machine is images
per core-second (user and system time of the process and its children). Random-resized-crop and flip, uint8 out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from distill.command_line import Parser, command, whole_number
from distill.data.augment.parameters import TrainTransform
from distill.data.dali import DaliLoader
from distill.data.index import ShardIndex
from distill.data.loaders import Task, train_task
from distill.data.reference import ReferenceLoader
from distill.protocols import Loader
from tests.bench.storage import cold, preparation, startup

EPILOG = """examples:
  python -m tests.bench.data speed --split data/mine/train --images images/train
  python -m tests.bench.data startup
  python -m tests.bench.data cold --split data/mine/train
  python -m tests.bench.data prepare --images images/train --workers 2"""
OURS = "ours, DALI"
WARM_UP = 3
"""Batches before the clock starts: they hold the build of pipelines and the start of workers."""

Batches = Iterator[int]
"""The number of images of each batch."""


def ours(kind: Callable[[Task], Loader], options: argparse.Namespace) -> Batches:
    """One of this project's loaders, endless."""
    task = train_task(
        ShardIndex.open(options.split),
        size=(options.side, options.side),
        transform=TrainTransform(),
        global_batch_size=options.batch,
        accumulate=1,
        rank=0,
        world_size=1,
        seed=0,
        device=torch.device("cpu"),
        num_threads=options.threads,
    )
    loader, epoch = kind(task), 0
    while True:
        for batch in loader.epoch(epoch):
            yield len(batch.labels)
        epoch += 1


def native_dali(options: argparse.Namespace) -> Batches:
    """DALI's own WebDataset reader with its random crop."""
    from nvidia.dali import Pipeline, fn, types

    index = ShardIndex.open(options.split)
    paths = [str(index.shard_path(number)) for number in range(len(index.shards))]
    pipeline = Pipeline(batch_size=options.batch, num_threads=options.threads, device_id=None, seed=0)
    with pipeline:
        read: Any = fn.readers.webdataset(paths=paths, ext=["jpg;png", "cls"], random_shuffle=True, initial_fill=256)
        images, labels = read
        images = fn.decoders.image_random_crop(images, random_area=(0.08, 1.0), random_aspect_ratio=(3 / 4, 4 / 3))
        images = fn.resize(images, size=(options.side, options.side), interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.flip(images, horizontal=fn.random.coin_flip())
        pipeline.set_outputs(images, fn.pad(labels))
    pipeline.build()
    while True:
        outputs: Any = pipeline.run()
        torch.from_dlpack(outputs[0].as_tensor()).clone()
        yield options.batch


def timm_transform(options: argparse.Namespace) -> Callable[[Any], Any]:
    """timm's training transform to uint8 CHW, random-resized-crop and flip only."""
    from timm.data import create_transform

    return create_transform(
        options.side, is_training=True, use_prefetcher=True, color_jitter=None, interpolation="bilinear", hflip=0.5
    )


def image_folder(options: argparse.Namespace) -> Batches:
    """torchvision's ImageFolder with timm's transforms in a DataLoader."""
    from timm.data.loader import fast_collate
    from torchvision.datasets import ImageFolder

    data = ImageFolder(options.images, transform=timm_transform(options))
    loader: Any = torch.utils.data.DataLoader(
        data,
        batch_size=options.batch,
        shuffle=True,
        num_workers=options.threads,
        collate_fn=fast_collate,
        drop_last=True,
        persistent_workers=True,
    )
    while True:
        for images, _ in loader:
            yield len(images)


def webdataset_pil(options: argparse.Namespace) -> Batches:
    """The webdataset package with PIL and timm's transforms in its own loader."""
    import webdataset
    from timm.data.loader import fast_collate

    index = ShardIndex.open(options.split)
    paths = [str(index.shard_path(number)) for number in range(len(index.shards))]
    data = webdataset.WebDataset(paths, shardshuffle=True, resampled=True).shuffle(256).decode("pil")
    data = (
        data.to_tuple("jpg;png", "cls")
        .map_tuple(timm_transform(options), int)
        .batched(options.batch, collation_fn=fast_collate)
    )
    loader: Any = webdataset.WebLoader(data, batch_size=None, num_workers=options.threads)
    for images, _ in loader:
        yield len(images)


PIPELINES: dict[str, Callable[[argparse.Namespace], Batches]] = {
    OURS: lambda options: ours(DaliLoader, options),
    "ours, reference": lambda options: ours(ReferenceLoader, options),
    "DALI's WebDataset reader": native_dali,
    "torchvision ImageFolder": image_folder,
    "webdataset and PIL": webdataset_pil,
}


def core_seconds() -> float:
    """User and system time of this process and its living children."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One pipeline for `seconds` seconds after its warm-up."""
    torch.set_num_threads(1)
    batches = PIPELINES[options.only](options)
    for _ in range(WARM_UP):
        next(batches)
    images, started, cores = 0, time.monotonic(), core_seconds()
    while (elapsed := time.monotonic() - started) < options.seconds:
        images += next(batches)
    return {"wall": images / elapsed, "core": images / (core_seconds() - cores)}


def speed(options: argparse.Namespace) -> None:
    """All pipelines in turn, `repeats` times, as a table of medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PIPELINES}
    for _ in range(options.repeats):
        for name in PIPELINES:
            line = [sys.executable, "-m", "tests.bench.data", *sys.argv[1:], "--only", name]
            done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    base = statistics.median(run["core"] for run in found[OURS])
    print(f"{'':26s} {'images/s':>9s} {'per core-s':>10s} {'ours is':>8s}   single runs, per core-second")
    for name, runs in found.items():
        wall, core = (statistics.median(run[key] for run in runs) for key in ("wall", "core"))
        singles = " ".join(f"{run['core']:.0f}" for run in runs)
        print(f"{name:26s} {wall:9.0f} {core:10.0f} {base / core:7.2f}x   {singles}")


@contextmanager
def other_load_told() -> Iterator[None]:
    """Says at the end how many cores other processes kept busy meanwhile: what a figure by the clock is worth."""

    def busy() -> tuple[float, float]:
        of_all, of_us = psutil.cpu_times(), os.times()
        used = of_all.user + of_all.nice + of_all.system + of_all.irq + of_all.softirq + of_all.steal
        return used, of_us.user + of_us.system + of_us.children_user + of_us.children_system

    started, (all_before, ours_before) = time.monotonic(), busy()
    yield
    all_after, ours_after = busy()
    others = (all_after - all_before - ours_after + ours_before) / (time.monotonic() - started)
    print(f"other processes used {max(0.0, others):.2f} of {os.cpu_count()} cores meanwhile")


@command
def main(argv: Sequence[str]) -> None:
    """Runs one benchmark."""
    parser = Parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("what", choices=("speed", "startup", "cold", "prepare"))
    parser.add_argument("--split", type=Path, help="a prepared split")
    parser.add_argument("--images", type=Path, help="the same images as CLASS/NAME.jpg")
    parser.add_argument("--side", type=whole_number(1), default=224)
    parser.add_argument("--batch", type=whole_number(1), default=64)
    parser.add_argument("--threads", type=whole_number(1), default=2, help="threads or workers of each pipeline (%(default)s)")
    parser.add_argument("--workers", type=whole_number(1), default=2, help="processes that prepare (%(default)s)")
    parser.add_argument("--shard-size", type=whole_number(1), default=250, help="images a shard of prepare (%(default)s)")
    parser.add_argument("--least", type=whole_number(1), default=4000, help="images to prepare (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement (%(default)s)")
    parser.add_argument("--repeats", type=whole_number(1), default=3)
    parser.add_argument("--samples", type=whole_number(1), default=1_281_167, help="size of the synthetic index (%(default)s)")
    parser.add_argument("--block", type=whole_number(1), default=64, help="samples of a block that cold shuffles (%(default)s)")
    parser.add_argument("--only", choices=tuple(PIPELINES), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.only:
        print(json.dumps(measure(options)), flush=True)
        os._exit(0)  # endless loaders with threads and workers: nothing of theirs is worth waiting for
    needs = {"speed": ("split", "images"), "cold": ("split",), "prepare": ("images",)}.get(options.what, ())
    if missing := [f"--{name}" for name in needs if getattr(options, name) is None]:
        parser.error(f"{options.what} needs {' and '.join(missing)}")
    with other_load_told():
        {"speed": speed, "startup": startup, "cold": cold, "prepare": preparation}[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
