#!/usr/bin/env python
"""Images a second of the data path beside its alternatives, the cost of a start at ImageNet's scale, and reads from disk.

Every measurement runs in a process of its own, the pipelines take turns, and the figure to trust on a shared machine is images
per core-second (user and system time of the process and its children). Random-resized-crop and flip, uint8 out.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):  # run as a script: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from distill.data.augment import TrainTransform
from distill.data.dali import AHEAD, READERS, DaliTrainLoader
from distill.data.index import INDEX, RECORD, ShardIndex, ShardInfo, write_split
from distill.data.order import TrainOrder
from distill.data.reader import SampleReader
from distill.data.reference import ReferenceTrainLoader
from distill.data.stream import Position, PositionStream

EPILOG = """examples:
  python pipelines/bench_data.py speed --split data/mine/train --images images/train
  python pipelines/bench_data.py startup
  python pipelines/bench_data.py cold --split data/mine/train
  python pipelines/bench_data.py prepare --images images/train --workers 2"""
OURS = "ours, DALI"
WARM_UP = 3
"""Batches before the clock starts: they hold the build of pipelines and the start of workers."""

Batches = Iterator[int]
"""The number of images of each batch."""


def ours(kind: Callable[..., Any], options: argparse.Namespace) -> Batches:
    """One of this project's loaders, endless."""
    loader = kind(
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
    epoch = 0
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
    OURS: lambda options: ours(DaliTrainLoader, options),
    "ours, reference": lambda options: ours(ReferenceTrainLoader, options),
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
            line = [sys.executable, __file__, *sys.argv[1:], "--only", name]
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


def startup(options: argparse.Namespace) -> None:
    """Time and memory to the first global batch of a synthetic index; the shards are sparse files of the right size."""
    with tempfile.TemporaryDirectory() as name:
        folder, per_shard = Path(name), 1251
        count = -(-options.samples // per_shard)
        records = np.zeros(options.samples, RECORD)
        rows = np.arange(options.samples)
        records["shard"], records["offset"], records["size"] = rows // per_shard, rows % per_shard * 110_592 + 512, 110_000
        infos = []
        for number in range(count):
            samples = min(per_shard, options.samples - number * per_shard)
            infos.append(ShardInfo(f"train-{number:04d}.tar", samples, samples * 110_592, ""))
            with (folder / infos[-1].name).open("wb") as file:
                file.truncate(infos[-1].bytes)
        write_split(folder, infos, records, [str(label) for label in range(1000)])
        before, started = psutil.Process().memory_info().rss, time.monotonic()
        index = ShardIndex.open(folder)
        TrainOrder(index.num_samples, 1024, 0).samples(0, 0)
        seconds, grown = time.monotonic() - started, psutil.Process().memory_info().rss - before
        size = (folder / INDEX).stat().st_size
        told = f"{options.samples:,} samples in {count} shards: {seconds:.2f} s, {grown / 1e6:.0f} MB resident"
        print(f"{told} (index {size / 1e6:.0f} MB)")


def cold(options: argparse.Namespace) -> None:
    """MB/s of the loader's reads beside sequential ones, in turn, each with the files out of the page cache."""
    index = ShardIndex.open(options.split)
    paths = [index.shard_path(number) for number in range(len(index.shards))]
    ways: dict[str, Callable[[], int]] = {
        "sequential, page cache": lambda: sum(map(_read_file, paths)),
        "sequential, direct, 4 at a time": lambda: _read_directly(paths),
        "in training order": lambda: _read_in_order(index, options.batch, 0),
        f"in blocks of {options.block}": lambda: _read_in_order(index, options.batch, options.block),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            _drop(paths)
            started = time.monotonic()
            found[name].append(way() / 1e6 / (time.monotonic() - started))
    for name, rates in found.items():
        print(f"{name:32s} {statistics.median(rates):6.0f} MB/s   single runs {' '.join(f'{rate:.0f}' for rate in rates)}")


def _read_file(path: Path) -> int:
    with path.open("rb", buffering=0) as file:
        while file.read(4 << 20):
            pass
        return file.tell()


def _read_directly(paths: list[Path]) -> int:
    """Past the page cache: what the disk itself can do."""

    def read(path: Path) -> int:
        buffer, position = mmap.mmap(-1, 4 << 20), 0  # aligned to a page, as O_DIRECT asks
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        while count := os.preadv(descriptor, [buffer], position):
            position += count
        os.close(descriptor)
        return position

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(read, paths))


def _read_in_order(index: ShardIndex, batch: int, block: int) -> int:
    """As the loader reads: so many threads, so far ahead."""
    reader = SampleReader(index)
    order = TrainOrder(index.num_samples, min(batch, index.num_samples), 0, block)

    def read_step(position: Position) -> int:
        samples = order.samples(0, position.micro)
        reader.announce(samples)
        return sum(len(reader.read(sample)) for sample in samples.tolist())

    stream = PositionStream(read_step, order.steps_per_epoch, depth=AHEAD, workers=READERS)
    total = sum(stream.take(Position(0, step)) for step in range(order.steps_per_epoch))
    stream.close()
    reader.close()
    return total


def _drop(paths: list[Path]) -> None:
    """Asks the kernel to forget the files; needs no rights for one's own."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def preparation(options: argparse.Namespace) -> None:
    """`prepare.py folder` against `workers` times one process that decodes and hashes the same images, in turn.

    Few images are repeated until there are `--least` of them, under other names. The start of the processes is what a source
    of one image a worker takes; it is measured beside the rest, so both figures are told.
    """
    with tempfile.TemporaryDirectory() as name:
        count = _repeat_images(options.images, Path(name) / "many", options.least)
        _repeat_images(options.images, Path(name) / "few", 0, options.workers)
        found: dict[str, list[Cost]] = {"single": [], "several": [], "start": [], "prepare": []}
        for _ in range(options.repeats):
            found["single"].append(_cost([sys.executable, "-c", DECODE_AND_HASH, f"{name}/many", "1"]))
            found["several"].append(_cost([sys.executable, "-c", DECODE_AND_HASH, f"{name}/many", str(options.workers)]))
            found["start"].append(_cost(_prepare_line(f"{name}/few", f"{name}/out", options.workers, 1)))
            found["prepare"].append(_cost(_prepare_line(f"{name}/many", f"{name}/out", options.workers, options.shard_size)))
    single, several, start, made = (Cost(*map(statistics.median, zip(*runs, strict=True))) for runs in found.values())
    after = Cost(made.wall - start.wall, made.core - start.core)
    print(
        f"{count} images, {options.workers} workers, shards of {options.shard_size}; medians of {options.repeats} runs in turn"
    )
    for name, cost in {
        "decode and hash, 1 process": single,
        f"decode and hash, {options.workers} processes": several,
        "prepare": made,
        "prepare after its start": after,
    }.items():
        print(f"{name:30s} {count / cost.wall:7.0f} images/s {count / cost.core:7.0f} per core-second")
    print(f"the start of prepare: {start.wall:.2f} s, {start.core:.2f} core-seconds")
    print(f"prepare is, of {options.workers} x 1 process: {single.wall / options.workers / made.wall:.2f} by the clock,")
    for name, cost in {"": made, ", after its start": after}.items():
        one, many = single.core / cost.core, several.core / cost.core
        print(f"  by core-seconds {one:.2f}; of {options.workers} processes at once: {many:.2f}{name}")


class Cost(NamedTuple):
    """What a command takes."""

    wall: float
    core: float


DECODE_AND_HASH = """
import hashlib, os, sys
from pathlib import Path
from PIL import Image
paths, processes = sorted(Path(sys.argv[1]).rglob("*.*")), int(sys.argv[2])
for number in range(processes):
    if os.fork() == 0:
        for path in paths[number::processes]:
            hashlib.sha256(path.read_bytes())
            Image.open(path).load()
        os._exit(0)
for number in range(processes):
    os.wait()
"""


def _cost(line: list[str]) -> Cost:
    before, started = os.times(), time.monotonic()
    subprocess.run(line, check=True, capture_output=True)
    seconds, after = time.monotonic() - started, os.times()
    return Cost(seconds, after.children_user + after.children_system - before.children_user - before.children_system)


def _prepare_line(source: str, out: str, workers: int, shard_size: int) -> list[str]:
    """The command, into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    script = Path(__file__).parents[1] / "shards/prepare.py"
    line = [sys.executable, str(script), "folder", "--source", source, "--out", out]
    return [*line, "--workers", str(workers), "--shard-size", str(shard_size)]


def _repeat_images(source: Path, target: Path, least: int, most: int | None = None) -> int:
    """Links to the images of `source`, repeated under other names until there are `least`, at most `most`; their number."""
    paths = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")][:most]
    copies = max(1, -(-least // len(paths)))
    for path in paths:
        folder = target / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            (folder / f"{path.stem}_{copy}{path.suffix}").symlink_to(path.resolve())
    return copies * len(paths)


def main() -> int:
    """Runs one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "startup", "cold", "prepare"))
    parser.add_argument("--split", type=Path, help="a prepared split")
    parser.add_argument("--images", type=Path, help="the same images as CLASS/NAME.jpg")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="threads or workers of each pipeline (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of prepare (%(default)s)")
    parser.add_argument("--shard-size", type=int, default=250, help="of prepare (%(default)s)")
    parser.add_argument("--least", type=int, default=4000, help="images of prepare (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1_281_167, help="of the synthetic index (%(default)s)")
    parser.add_argument("--block", type=int, default=64, help="samples of a block in cold's block shuffle (%(default)s)")
    parser.add_argument("--only", choices=tuple(PIPELINES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options)), flush=True)
        os._exit(0)  # endless loaders with threads and workers: nothing of theirs is worth waiting for
    needs = {"speed": ("split", "images"), "cold": ("split",), "prepare": ("images",)}.get(options.what, ())
    if missing := [f"--{name}" for name in needs if getattr(options, name) is None]:
        parser.error(f"{options.what} needs {' and '.join(missing)}")
    with other_load_told():
        {"speed": speed, "startup": startup, "cold": cold, "prepare": preparation}[options.what](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
