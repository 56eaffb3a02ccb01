"""The run: its settings, its parts, where it stands, and what of it a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from distill.agreement import Control
from distill.checkpoint import Checkpoints, Snapshot
from distill.distiller import Distiller
from distill.dot import DOT
from distill.evaluation import known_bad_samples
from distill.metrics import Throughput
from distill.nonfinite import Guard
from distill.optim import Schedule
from distill.protocols import Batch, Loader, Progress
from distill.report import Reporter
from distill.seeds import derive_seed, seed_all

Transform = Callable[[Batch, int], tuple[Tensor, Tensor]]
"""(batch, epoch) -> images as the models see them, and labels."""


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of the loop; every one is in the recipe."""

    epochs: int
    steps_per_epoch: int
    global_batch_size: int
    accumulate: int = 1
    max_steps: int = 0
    clip_gradient_norm: float = 0.0
    skip_nonfinite: int = 0
    evaluate_every: int = 1
    checkpoint_every: int = 0
    checkpoint_minutes: float = 0.0
    log_every: int = 50
    gradient_shares: bool = False

    @property
    def last_step(self) -> int:
        """The step after which training ends."""
        steps = self.epochs * self.steps_per_epoch
        return min(steps, self.max_steps) if self.max_steps else steps

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after this step: after every `evaluate_every` epochs, and at the end."""
        epoch, rest = divmod(step, self.steps_per_epoch)
        return step == self.last_step or (rest == 0 and epoch > 0 and epoch % self.evaluate_every == 0)


@dataclass
class Counters:
    """What a run has done so far; travels in the checkpoint."""

    step: int = 0
    evaluated_step: int = 0
    best_top1: float = -1.0
    evaluation: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    images: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Run:
    """Everything that one training run holds, built by the caller; `counters` is where it stands."""

    accelerator: Accelerator
    settings: LoopSettings
    control: Control
    """What all processes decide together."""
    watch: Callable[[int, str], None]
    """Told of every step and phase that begins; a watchdog ends the run when it hears nothing for too long."""
    seed: int
    """The recipe's; every random number of a step is derived from it, the step and the rank."""
    distiller: nn.Module
    """A `Distiller` as Accelerate prepared it: perhaps inside DDP."""
    classifier: nn.Module
    """The student that is evaluated: images -> output with `.logits`; shares the student's (or the average's) weights."""
    teacher: nn.Module | None
    optimizer: torch.optim.Optimizer
    guard: Guard
    learning_rate: Schedule
    train_loader: Loader
    eval_loader: Loader
    transform: Transform
    """A loader's batch -> images and labels as the models see them."""
    generator: torch.Generator
    """The criteria's, on the device."""
    reporter: Reporter
    checkpoints: Checkpoints
    average: Any = None
    """timm's ModelEmaV3 of the plain student, or None."""
    around_backward: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered around every backward pass."""
    after_step: Callable[[], None] = lambda: None
    """Called after every optimiser step that this process made."""
    name_samples: Callable[[Sequence[int]], list[str]] = lambda ids: [str(i) for i in ids]
    """Sample ids -> keys of the shards, for reports."""
    counters: Counters = field(default_factory=Counters)
    throughput: Throughput = field(default_factory=Throughput)

    @property
    def unwrapped(self) -> Distiller:
        """The `Distiller` itself."""
        return self.accelerator.unwrap_model(self.distiller)

    @property
    def dot(self) -> DOT | None:
        """The optimiser itself where it takes the distillation's gradient apart, else None."""
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper
        return inner if isinstance(inner, DOT) else None

    @property
    def progress(self) -> Progress:
        """The place in training that schedules are read at."""
        steps_per_epoch = self.settings.steps_per_epoch
        return Progress(self.counters.step, steps_per_epoch, self.settings.epochs * steps_per_epoch)

    def seed_step(self, step: int) -> None:
        """Seeds this process's generators for an optimiser step; ranks draw different numbers."""
        rank = self.accelerator.process_index
        seed_all(derive_seed(self.seed, "step", step, rank))
        self.generator.manual_seed(derive_seed(self.seed, "criteria", step, rank))


def save(run: Run) -> None:
    """Starts a checkpoint of the present step; every process calls it, the main process writes."""
    counters = run.counters
    run.watch(counters.step, "saving")
    counters.images, counters.training_seconds = run.throughput.images, run.throughput.seconds
    data = agree_on_data(run)
    if not run.accelerator.is_main_process:
        return
    weights = run.unwrapped.trained_state()
    if run.average is not None:
        weights["ema"] = run.average.module.state_dict()
    scaler = run.accelerator.scaler
    state = {"optimizer": run.optimizer.state_dict(), "scaler": None if scaler is None else scaler.state_dict()}
    run.checkpoints.save(counters.step, Snapshot(weights, state, {**vars(counters), "data": data}))


def agree_on_data(run: Run) -> dict[str, Any]:
    """The state of the data, the same on every process: position, what both streams depend on, and the bad samples.

    A collective: from now on every process leaves out the samples that any of them found bad.
    """
    epoch, step = divmod(run.counters.step, run.settings.steps_per_epoch)
    states = {}
    for name, loader in (("train", run.train_loader), ("val", run.eval_loader)):
        states[name] = {**loader.state(), "bad_samples": known_bad_samples(loader)}
        loader.restore(states[name])
    return {"epoch": epoch, "step": step, **states}


def restore(run: Run, snapshot: Snapshot) -> None:
    """Puts the run where `snapshot` was taken; every process calls it."""
    distiller = run.unwrapped
    distiller.plain_student.load_state_dict(snapshot.weights["student"])
    distiller.criteria.load_state_dict(snapshot.weights.get("criteria", {}))
    run.optimizer.load_state_dict(snapshot.state["optimizer"])
    if run.average is not None:
        run.average.module.load_state_dict(snapshot.weights["ema"])
    if run.accelerator.scaler is not None and snapshot.state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(snapshot.state["scaler"])
    counters = dict(snapshot.meta)
    data = counters.pop("data")
    run.train_loader.restore(data["train"])
    run.eval_loader.restore(data["val"])
    run.counters = Counters(**counters)
    run.throughput = Throughput(run.counters.images, run.counters.training_seconds)
