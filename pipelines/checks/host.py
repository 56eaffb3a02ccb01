"""Checks of the host: cores, memory, limits, the disk of the runs, the shards' reads, and what the CPU decodes."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from distill.data.augment.parameters import TrainTransform
from distill.data.dali import READERS
from distill.data.index import ShardIndex
from distill.data.loaders import train_task
from distill.data.reader import BadSample, SampleReader, files_allowed
from distill.files import locked, sync
from pipelines.checks.finding import Finding, at_least, judged, passed, skipped
from pipelines.checks.place import Place
from pipelines.setup.data import LOADERS, loader_name
from pipelines.setup.machine import num_threads

FREE_GIB, MEMORY_GIB = 20.0, 8.0
"""Room for checkpoints and logs of a long run; memory of a process with its decoder, beside the page cache."""
CHECKPOINT_MB = 200
LEAST_WRITE, LEAST_READ = 50.0, 100.0
"""MB/s: a checkpoint within seconds; 900 images a second, what one old GPU wants."""
READ_SECONDS = 3.0
JUDGED_MB = 50
"""Shards of less are read before a rate can be told."""


def host(place: Place) -> Iterator[Finding]:
    """Cores that this process may use, memory that is free, open files and locked memory."""
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    quota = cpu_quota()
    text = f"{usable} of {cores} usable" + (f", and a quota of {quota:.1f}" if quota else "")
    remedy = "raise the container's quota, or say --data.num_threads"
    yield judged("cores", not quota or quota >= usable, text, remedy, "WARN")
    per_gpu = usable / max(1, torch.cuda.device_count())
    if torch.cuda.is_available():
        yield at_least("cores per GPU", per_gpu, 6, "cores", "feeding a fast GPU takes about 6", digits=1)
    available = meminfo("MemAvailable") / 2**20
    yield at_least("memory available", available, MEMORY_GIB, "GiB", "close other programs", digits=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = len(ShardIndex.open(place.read).shards)
    text = f"{soft:,} (hard limit {hard:,}), {shards:,} shards"
    remedy = "ulimit -n: shards above a quarter of it are opened anew for every image"
    yield judged("open files", files_allowed(shards) >= shards, text, remedy, "WARN")
    locked_memory, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield passed("locked memory", "unlimited" if locked_memory < 0 else f"{locked_memory / 2**20:,.0f} MiB")


def cpu_quota() -> float | None:
    """Cores that the control group grants; None where it sets no limit."""
    file = Path("/sys/fs/cgroup/cpu.max")
    limit, period = file.read_text().split() if file.is_file() else ("max", "1")
    return None if limit == "max" else int(limit) / int(period)


def meminfo(name: str) -> int:
    """KiB of an entry of /proc/meminfo; 0 where it is not there."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def storage(place: Place) -> Iterator[Finding]:
    """Room, locks and the writing rate where runs will lie; reading and decoding of the shards."""
    out = Path(place.out)
    out.mkdir(parents=True, exist_ok=True)
    yield at_least("room for runs", shutil.disk_usage(out).free / 2**30, FREE_GIB, "GiB", f"free some on the disk of {out}")
    yield locks(out)
    rate = write_rate(out)
    remedy = "checkpoints will stall the run; choose a faster disk for --out"
    yield at_least("writing a checkpoint", rate, LEAST_WRITE, "MB/s", remedy)
    index = ShardIndex.open(place.read)
    megabytes, images, bad = read_rate(index)
    remedy = "stage the shards on a local disk, or say --data.shuffle blocks --data.shuffle_block 64"
    if sum(shard.bytes for shard in index.shards) < JUDGED_MB * 1e6:
        yield skipped("reading shards at random", f"the shards have less than {JUDGED_MB} MB; give --shards")
    else:
        yield at_least("reading shards at random", megabytes, LEAST_READ, "MB/s", remedy)
    yield judged("samples", not bad, f"{images:,} read, {bad} bad", f"python shards/prepare.py verify {place.read} --full")
    text = f"{decode_rate(index):,.0f} images/s on {num_threads(0)} threads, loader {loader_name('auto')}"
    yield passed("decoding on the CPU", text)


def locks(folder: Path) -> Finding:
    """Whether a lock on the runs' disk keeps a second process out."""
    inside = folder / ".doctor"
    remedy = "two runs could write to one folder; choose another disk for --out"
    first = locked(inside)
    try:
        locked(inside).close()
    except BlockingIOError:
        return passed("locks", "a second process is kept out")
    except OSError as error:
        return Finding("FAIL", "locks", f"cannot be had: {error}", remedy)
    finally:
        first.close()
        shutil.rmtree(inside)
    return Finding("FAIL", "locks", "a second process is let in", remedy)


def write_rate(folder: Path) -> float:
    """MB/s of writing a file of a checkpoint's size until it is on the disk."""
    path, block = folder / ".doctor.bin", os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(CHECKPOINT_MB):
                file.write(block)
        sync(path)
        return CHECKPOINT_MB / (time.perf_counter() - start)
    finally:
        path.unlink()


def read_rate(index: ShardIndex) -> tuple[float, int, int]:
    """MB/s, images and bad samples of reads in random order, past what the page cache holds of the shards."""
    for shard in range(len(index.shards)):
        descriptor = os.open(index.shard_path(shard), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    reader = SampleReader(index)
    order = iter(np.random.default_rng(0).permutation(index.num_samples).tolist())
    end = time.perf_counter() + READ_SECONDS

    def read(_: int) -> tuple[int, int, int]:
        """Bytes, images and bad samples that one thread reads until the time is over."""
        size = images = bad = 0
        while time.perf_counter() < end and (sample := next(order, None)) is not None:
            try:
                size += len(reader.read(sample))
            except BadSample:
                bad += 1
            images += 1
        return size, images, bad

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(read, range(READERS)))
    seconds = time.perf_counter() - start
    reader.close()
    size, images, bad = (sum(each) for each in zip(*found, strict=True))
    return size / seconds / 1e6, images, bad


def decode_rate(index: ShardIndex) -> float:
    """Images per second that the CPU's loader makes ready at 224 pixels."""
    batch = min(64, index.num_samples)
    task = train_task(
        index,
        size=(224, 224),
        transform=TrainTransform(),
        global_batch_size=batch,
        accumulate=1,
        rank=0,
        world_size=1,
        seed=0,
        device=torch.device("cpu"),
        num_threads=num_threads(0),
    )
    loader = LOADERS[loader_name("auto")](task)
    batches = (each for epoch in range(10**6) for each in loader.epoch(epoch))
    for _ in islice(batches, 3):  # what the start made ready
        pass
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < READ_SECONDS:
        images += len(next(batches).labels)
    rate = images / (time.perf_counter() - start)
    loader.close()
    return rate
