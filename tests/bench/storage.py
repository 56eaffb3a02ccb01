"""Benchmarks of what lies on disk: a start at ImageNet's scale, reads past the page cache, preparation. See `data.py`."""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]

from distill.data.dali import AHEAD, READERS
from distill.data.index import RECORD, ShardIndex, ShardInfo, write_split
from distill.data.manifest import INDEX
from distill.data.order import TrainOrder
from distill.data.reader import SampleReader
from distill.data.stream import Position, PositionStream, next_position


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
    """Bytes read as the loader reads them: by so many threads, so far ahead."""
    reader = SampleReader(index)
    order = TrainOrder(index.num_samples, min(batch, index.num_samples), 0, block)

    def read_step(position: Position) -> int:
        samples = order.samples(0, position.micro)
        reader.announce(samples)
        return sum(len(reader.read(sample)) for sample in samples.tolist())

    stream = PositionStream(read_step, lambda at: next_position(at, order.steps_per_epoch), depth=AHEAD, workers=READERS)
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
    script = Path(__file__).parents[2] / "shards/prepare.py"
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
