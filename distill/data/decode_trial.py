"""The child process of `decoding.try_decode`: decodes images by DALI in one mode and prints its figures as a JSON line.

python -m distill.data.decode_trial images.npz --mode whole --device cuda:0 --threads 8
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from distill.children import end_with_parent
from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import EntryPlan, whole_windows
from distill.data.dali_graph import IN_FLIGHT, DecodeMode, HostBatch, build_pipeline, feed
from distill.data.pixels import decode
from distill.data.stream import Position

ROUNDS, SECONDS = 20, 3.0
"""Batches against the clock, and the time after which no more are begun: images of 12 megapixels take seconds a batch."""


def load_images(path: Path) -> list[NDArray[np.uint8]]:
    """The encoded images of a file that `try_decode` wrote."""
    with np.load(path) as file:
        return np.split(file["data"], np.cumsum(file["lengths"])[:-1])


def pil_pixels(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: the image as PIL decodes it."""
    return np.asarray(decode(data.tobytes()))


def create_batches(images: list[NDArray[np.uint8]]) -> tuple[EntryPlan, HostBatch, HostBatch]:
    """A plan over the images, their random crops of training, and the whole images, as evaluation wants them."""
    count = len(images)
    plan = EntryPlan([(0, np.arange(count))], batch_size=count, size=(224, 224), transform=TrainTransform(), seed=0)
    sizes = np.array([pil_pixels(data).shape[:2] for data in images], np.int64)
    work = plan.work(Position(0, 0), sizes, np.arange(count))
    crops = HostBatch(images, sizes, work, np.zeros(count, np.int64), np.arange(count))
    return plan, crops, replace(crops, work=replace(work, windows=whole_windows(sizes)))


def decoded_batches(pipeline: Any, plan: EntryPlan, batches: Iterable[HostBatch]) -> Iterator[Any]:
    """DALI's images of each of endless `batches`, with as many in flight as in a run."""
    source = iter(batches)
    for _ in range(IN_FLIGHT):  # the first schedule_run starts so many runs
        feed(pipeline, plan, next(source), decode_only=True)
    while True:
        pipeline.schedule_run()
        yield pipeline.share_outputs()[0]
        pipeline.release_outputs()
        feed(pipeline, plan, next(source), decode_only=True)


def errors(images: Any, batch: HostBatch) -> list[tuple[int, float]]:
    """The largest and the mean difference of each image from PIL's pixels of its window."""
    on_host, found = images.as_cpu(), []
    for row, (top, left, height, width) in enumerate(batch.work.windows.tolist()):
        expected = pil_pixels(batch.encoded[row])[top : top + height, left : left + width]
        difference = np.abs(on_host.at(row).astype(np.int16) - expected)
        found.append((int(difference.max()), float(difference.mean())))
    return found


def cpu_seconds() -> float:
    """CPU time of this process so far, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def pil_seconds(images: Sequence[NDArray[np.uint8]]) -> float:
    """CPU seconds in which PIL decodes an image of these."""
    start = time.thread_time()
    for data in images:
        pil_pixels(data)
    return (time.thread_time() - start) / len(images)


def measure(images: list[NDArray[np.uint8]], mode: DecodeMode, device: torch.device, threads: int) -> dict[str, Any]:
    """The figures of a `DecodeTrial`, by name."""
    plan, crops, whole = create_batches(images)
    pipeline = build_pipeline(plan, device, threads, decode_only=True, mode=mode)
    outputs = decoded_batches(pipeline, plan, itertools.chain([crops, whole], itertools.repeat(crops)))
    found = [pair for batch in (crops, whole) for pair in errors(next(outputs), batch)]
    next(outputs)  # it was decoded while PIL was at work
    next(outputs)
    start, cpu, count = time.monotonic(), cpu_seconds(), 0
    while count < ROUNDS and time.monotonic() - start < SECONDS:
        next(outputs)
        count += 1
    decoded = count * len(images)
    return {
        "images_per_second": decoded / (time.monotonic() - start),
        "cpu_seconds_per_image": (cpu_seconds() - cpu) / decoded,
        "pil_seconds_per_image": pil_seconds(images),
        "max_error": max(largest for largest, _ in found),
        "mean_error": float(np.mean([mean for _, mean in found])),
    }


def main(argv: Sequence[str]) -> None:
    """Prints the figures of the mode on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="written by distill.data.decoding.try_decode")
    parser.add_argument("--mode", choices=get_args(DecodeMode), required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--threads", type=int, required=True)
    asked = parser.parse_args(argv)
    end_with_parent(signal.SIGKILL)  # it has a session of its own, so what ends its parent would not end it
    print(json.dumps(measure(load_images(asked.images), asked.mode, asked.device, asked.threads)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
