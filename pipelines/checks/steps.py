"""Checks of a step's semantics on the device: poisoned steps, fp16, waiting of the host, and too little memory."""

from __future__ import annotations

import gc
import math
import re
import warnings
from collections.abc import Iterator
from itertools import islice

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

from distill.agreement import Control
from distill.data.index import ShardIndex
from distill.engine import settle, train_step
from distill.losses import LOSSES
from distill.protocols import Batch
from distill.recipe import Recipe
from distill.run import Run
from pipelines.checks.finding import Finding, judged, passed, skipped
from pipelines.checks.place import Place
from pipelines.setup.arguments import parse
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import build_accelerator
from pipelines.setup.models import Models
from pipelines.setup.out_of_memory import OutOfMemory, memory_explained

POISONED = (0, 3)
"""Steps with one pixel that is not a number: the first, when the optimiser has no state yet, and one when it has."""
STEPS, FP16_STEPS = 6, 20
HIGH_SCALE = 65_536.0
"""The scale that fp16 begins with."""
WAITED = "called a synchronizing CUDA operation"
"""What PyTorch's warning of a wait says; its notice that not all waits are found says "synchronizing" too."""
MEMORY_SHARE, HUGE_BATCH = 0.05, 1024
"""A share of the GPU's memory, and a batch that does not fit into it."""


class Stage:
    """A run at step 0 with a few batches in memory, stepped by hand."""

    def __init__(self, place: Place, *more: str) -> None:
        AcceleratorState._reset_state(True)  # every stage has a precision of its own
        PartialState._reset_state()
        precision = ["--train.mixed_precision", "bf16"] if place.on_gpu else []
        self.recipe: Recipe = parse([*place.options(), "--out", place.folder, *precision, *more], LOSSES).recipe
        accelerator = build_accelerator(self.recipe)
        built: tuple[Run, Models] = build(self.recipe, accelerator, build_splits(self.recipe, accelerator), Control())
        self.run, self.models = built
        self.run.distiller.train()
        self.batches = list(islice(self.run.train_loader.epoch(0), 3))
        self.poison = False
        transform = self.run.transform

        def transformed(batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
            images, labels = transform(batch, epoch)
            if self.poison:
                images = images.clone()
                images[0, 0, 0, 0] = math.nan
            return images, labels

        self.run.transform = transformed

    def step(self) -> dict[str, Tensor]:
        """The next step's values."""
        values, _ = train_step(self.run, [self.batches[self.run.counters.step % len(self.batches)]], False)
        self.run.counters.step += 1
        return values

    def state(self) -> list[Tensor]:
        """Copies of weights, statistics and the optimiser's state."""
        optimizer = getattr(self.run.optimizer, "optimizer", self.run.optimizer)
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return [each.detach().clone() for each in (*self.run.unwrapped.plain_student.state_dict().values(), *kept)]

    def close(self) -> None:
        """Gives memory and threads back, for the next stage."""
        for loader in (self.run.train_loader, self.run.eval_loader):
            loader.close()
        self.run.checkpoints.close()
        del self.run, self.models, self.batches
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def steps(place: Place) -> Iterator[Finding]:
    """Poisoned and waiting steps with both kinds of optimiser, then fp16."""
    yield from poisoned(place, "SGD")
    yield from poisoned(place, "AdamW", "--optim.name", "adamw", "--optim.learning_rate", "0.001")
    yield from poisoned(place, "LAMB", "--optim.name", "lamb", "--optim.learning_rate", "0.001")
    yield from fp16(place)


def poisoned(place: Place, name: str, *more: str) -> Iterator[Finding]:
    """Whether a poisoned step leaves all as it was, and what follows is finite."""
    stage = Stage(place, "--train.skip_nonfinite", str(len(POISONED)), *more)
    for number in range(STEPS):
        stage.poison, before = number in POISONED, stage.state()
        stage.step()
        settle(stage.run)
        after = stage.state()
        if stage.poison:
            pairs = list(zip(before, after, strict=False))  # a first step makes the optimiser's state; it is looked at below
            same = all(torch.equal(a, b) for a, b in pairs)
            kept = f"weights, statistics and the optimiser's state {'are' if same else 'are not'} what they were"
            yield judged(f"{name}, poisoned step {number}", same, kept, "report it: one bad image can destroy a run")
        elif not all(bool(each.isfinite().all()) for each in after):
            yield Finding("FAIL", f"{name}, step {number}", "not finite after a poisoned step", "report it")
    skipped_steps = stage.run.counters.skipped_steps
    yield judged(f"{name}, steps skipped", skipped_steps == len(POISONED), f"{skipped_steps} of {len(POISONED)}")
    yield (
        waiting(place, stage, name)
        if stage.run.guard.deferred or not place.on_gpu
        else passed(f"{name}, waiting of the host", "once a step, as PyTorch has no fused form of it")
    )
    stage.close()


def waiting(place: Place, stage: Stage, name: str) -> Finding:
    """Whether the host waits for the device in a step that is not logged."""
    if not place.on_gpu:
        return skipped(f"{name}, waiting of the host", "on a CPU the host is the device")
    stage.poison = False
    for _ in range(3):
        stage.step()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        stage.step()
        stage.step()
        torch.cuda.set_sync_debug_mode("default")
    places = sorted({f"{each.filename.split('/')[-1]}:{each.lineno}" for each in caught if WAITED in str(each.message)})
    text = (
        f"the host waits at {', '.join(places)}" if places else f"none, guard {'deferred' if stage.run.guard.deferred else ''}"
    )
    return judged(f"{name}, waiting of the host", not places, text, "report it: the device idles", "WARN")


def fp16(place: Place) -> Iterator[Finding]:
    """Whether fp16 trains from its first, high scale."""
    if not place.on_gpu:
        yield skipped("fp16", "it needs a GPU")
        return
    stage = Stage(place, "--train.mixed_precision", "fp16", "--train.skip_nonfinite", str(FP16_STEPS))
    losses = [float(stage.step()["loss/total"]) for _ in range(FP16_STEPS)]
    finite = all(bool(each.isfinite().all()) for each in stage.run.unwrapped.plain_student.state_dict().values())
    scaler = stage.run.accelerator.scaler
    scale = scaler.get_scale() if scaler is not None else 0.0
    text = f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {FP16_STEPS} steps, scale {HIGH_SCALE:,.0f} -> {scale:,.0f}"
    yield judged("fp16", finite and losses[-1] < losses[0], text, "train in bf16")
    stage.close()


def memory(place: Place) -> Iterator[Finding]:
    """Whether a step that does not fit ends with advice, and the advice fits."""
    images = ShardIndex.open(place.train).num_samples
    batch = 2 ** int(math.log2(min(HUGE_BATCH, images))) if place.on_gpu else place.batch
    stage = Stage(place, "--train.global_batch_size", str(batch))
    if place.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE)
    try:
        with memory_explained(stage.recipe, stage.run, stage.models):
            if not place.on_gpu:  # a CPU that runs out of memory kills the process instead
                raise torch.OutOfMemoryError("no memory is left (pretended)")
            stage.step()
    except OutOfMemory as error:
        advice = str(error)
        yield passed("out of memory", advice[:300])
    else:
        yield Finding("FAIL", "out of memory", f"{batch} images fit into {MEMORY_SHARE:.0%} of the memory", "report it")
        return
    stage.close()
    if place.on_gpu:
        yield from advised(place, batch, advice)


def advised(place: Place, batch: int, advice: str) -> Iterator[Finding]:
    """Whether a step fits once the advice is followed, under the same limit."""
    found = re.search(r"--train.accumulate (\d+)", advice)
    if found is None:
        yield Finding("FAIL", "advice", "names no micro-batch that would fit", "report it")
        return
    torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE)
    try:
        stage = Stage(place, "--train.global_batch_size", str(batch // int(found[1])))  # one micro-batch of that step
        stage.step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        yield Finding(
            "FAIL", "advice", f"--train.accumulate {found[1]} does not fit: {str(error).splitlines()[0]}", "report it"
        )
    else:
        yield passed("advice", f"--train.accumulate {found[1]} fits")
        stage.close()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
