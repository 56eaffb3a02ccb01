"""Checks of what the device decodes and draws: each mode in a process of its own, the graphs' pixels, batches under load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import get_args

import torch

from distill.data.augment.parameters import TrainTransform
from distill.data.dali import DaliLoader
from distill.data.dali_graph import DecodeMode, dali_available
from distill.data.decoding import choose_decoding, proof_images, try_decode
from distill.data.index import ShardIndex
from distill.data.loaders import Task, eval_task, train_task
from distill.protocols import Batch, InputSpec
from pipelines.checks.finding import Finding, at_least, at_most, judged, passed, skipped
from pipelines.checks.place import Place
from pipelines.setup.machine import num_threads

LEAST_RATE = 12_000
"""Images per second that keep a fast GPU fed: 1.3 times the step of ResNet-34 -> ResNet-18."""
TRIAL_SECONDS = 40.0
MAX_ERROR, MEAN_ERROR = 8, 0.5
"""Levels between the device's graph and the CPU's; where Equalize or a rotation turns one level into many, the mean decides."""
SIZE = 224
EPOCHS, BATCHES, LEAK = 40, 3, 0.5e9
"""Epochs of so many batches, and the bytes that the allocator may keep more after them."""

NO_DALI = "DALI is not installed"


def decoding(place: Place) -> Iterator[Finding]:
    """Every mode of `data.decode`, and what `auto` makes of them."""
    if not dali_available():
        yield skipped("decoding", NO_DALI)
        return
    index = ShardIndex.open(place.read)
    images = proof_images(index)
    modes: tuple[DecodeMode, ...] = get_args(DecodeMode) if place.on_gpu else ("window",)
    for mode in modes:
        trial = try_decode(mode, images, place.device, num_threads(0), TRIAL_SECONDS)
        if not trial.works:
            yield Finding("WARN", f"decode {mode}", trial.error, "data.decode: auto does without it")
            continue
        text = (
            f"{trial.images_per_second:,.0f} images/s, {1e3 * (trial.cpu_seconds_per_image or 0):.2f} ms of CPU time an image,"
            f" at most {trial.max_error} levels off PIL, {trial.mean_error:.3f} in the mean"
        )
        yield passed(f"decode {mode}", text, trial.images_per_second)
    if not place.on_gpu:
        yield skipped("decoding on a GPU", "there is none" if not place.pretend else "a CPU stands in for it")
        return
    chosen = choose_decoding("auto", index, place.device, num_threads(0), TRIAL_SECONDS)
    place.decode.write_text(chosen.mode)
    yield judged("data.decode: auto", not chosen.warning, chosen.warning or f"takes {chosen.mode}", "", "WARN")
    rate = next((t.images_per_second for t in chosen.trials if t.mode == chosen.mode and t.images_per_second), 0.0)
    remedy = "the step will wait for data on a fast GPU: more cores, or smaller images in the shards"
    yield at_least("rate of the mode taken", rate, LEAST_RATE, "images/s", remedy)


def tasks(place: Place, device: torch.device) -> dict[str, Callable[[], Task]]:
    """Every kind of graph over the place's shards."""
    train, val = ShardIndex.open(place.train), ShardIndex.open(place.val)
    shared = {"rank": 0, "world_size": 1, "device": device, "num_threads": num_threads(0)}

    def views(**options: object) -> Task:
        transform = TrainTransform(**options)  # type: ignore[arg-type]
        batch = {"global_batch_size": place.batch, "accumulate": 1, "seed": 0}
        return train_task(train, size=(SIZE, SIZE), transform=transform, **batch, **shared)  # type: ignore[arg-type]

    def whole(crop: float) -> Task:
        spec = InputSpec(SIZE, SIZE, (0.0,) * 3, (1.0,) * 3, "bilinear", crop)
        return eval_task(val, spec=spec, batch_size=place.batch, **shared)  # type: ignore[arg-type]

    return {
        "random crops": views,
        "padded crops": lambda: views(crop="pad"),
        "bicubic": lambda: views(interpolation="bicubic"),
        "RandAugment": lambda: views(rand_augment="rand-m9-mstd0.5-inc1"),
        "colour jitter": lambda: views(color_jitter=0.4),
        "evaluation, crop 0.875": lambda: whole(0.875),
        "evaluation, crop 1.0": lambda: whole(1.0),
    }


def first_batches(task: Task, count: int = 2) -> list[Batch]:
    """The first batches of the graph that a GPU has, wherever it runs."""
    loader = DaliLoader(task, decode_only=False)
    try:
        return [Batch(*(each.cpu() for each in batch if each is not None)) for batch in islice(loader.epoch(0), count)]
    finally:
        loader.close()


def pixels(place: Place) -> Iterator[Finding]:
    """The device's graph of every kind against the CPU's, on the same samples."""
    if not dali_available():
        yield skipped("pixels", NO_DALI)
        return
    for name, make in tasks(place, place.device).items():
        task = make()
        ours, theirs = first_batches(task), first_batches(replace(task, device=torch.device("cpu"), decode="window"))
        pairs = list(zip(ours, theirs, strict=True))
        same = all(torch.equal(a.labels, b.labels) and torch.equal(a.sample_ids, b.sample_ids) for a, b in pairs)
        off = torch.cat([(a.images.int() - b.images.int()).abs().float() for a, b in pairs])
        far = float((off > MAX_ERROR).float().mean())
        text = f"mean {off.mean():.3f} levels (at most {MEAN_ERROR}), {far:.6f} of the values over {MAX_ERROR}"
        fine = same and float(off.mean()) <= MEAN_ERROR and far < 1e-3
        yield judged(name, fine, text if same else "other samples or labels", "say --data.decode host and report it")


def ownership(place: Place) -> Iterator[Finding]:
    """Whether a batch stays what it was while the device is busy and the next ones are made; what the allocator keeps."""
    if not dali_available():
        yield skipped("ownership", NO_DALI)
        return
    loader = DaliLoader(tasks(place, place.device)["random crops"](), decode_only=False)
    load = torch.randn(4096 if place.on_gpu else 64, 4096 if place.on_gpu else 64, device=place.device)
    count = 40 if place.on_gpu else 8

    def sums(late: bool) -> list[int]:
        """The sum of each batch, read at once, or not before all batches were made."""
        nonlocal load
        found: list[torch.Tensor] = []
        epochs = (batch for epoch in range(10**6) for batch in loader.epoch(epoch))
        for batch in islice(epochs, count):
            for _ in range(3):
                load = (load @ load).clamp(-1, 1)
            total = batch.images.long().sum() + batch.labels.sum()
            found.append(total if late else total.cpu())
        return [int(each) for each in found]

    late, at_once = sums(True), sums(False)
    wrong = sum(a != b for a, b in zip(late, at_once, strict=True))
    text = f"{count - wrong} of {count} batches are unchanged when their sums are read late"
    yield judged("batches under load", not wrong, text, "report it: training sees wrong images")
    if place.on_gpu:
        before = torch.cuda.memory_reserved()
        for epoch in range(EPOCHS):
            for _ in islice(loader.epoch(epoch), BATCHES):
                pass
        grown = torch.cuda.memory_reserved() - before
        yield at_most(f"memory kept after {EPOCHS} epochs", grown / 1e6, LEAK / 1e6, "MB", "report it")
    loader.close()
