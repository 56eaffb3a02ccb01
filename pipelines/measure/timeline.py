"""One time line of a training step, cut into named parts that sum to the step; nothing waits for the device on the way.

A mark says which part the time from now on belongs to: CUDA events on a GPU, `perf_counter` on a CPU. Marks are set where the
work is called, by wrappers around the models, the losses and the optimiser of a run, and in the backward pass by hooks on
the tensors between them: autograd runs later nodes first, so the losses' backwards come one after the other, the last loss
first, and the student's after all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from distill.engine import train_step
from distill.protocols import Batch, Loader
from distill.run import Run

DATA = "data wait"
TRANSFORM = "pixels and mixing"
TEACHER = "teacher forward"
FORWARD = "student forward"
BACKWARD = "student backward"
ALL_REDUCE = "all-reduce"
OPTIMISER = "optimiser"
AVERAGE = "weight average"
REST = "the rest"
OUTSIDE = ""
"""The time between two measured steps."""


def loss_part(name: str, backward: bool = False) -> str:
    """The part of a loss term, or of its backward pass down to the student's outputs."""
    return f"loss {name} backward" if backward else f"loss {name}"


class Line(Protocol):
    """A line that is told which part of the step begins."""

    def enter(self, part: str) -> str:
        """Begins `part`; returns the part before."""
        ...


class Timeline:
    """Marks of measured steps; `cut` turns them into milliseconds and is the only thing that waits for the device."""

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None) -> None:
        """`clock`, in seconds, in place of the device's own time line."""
        self.device, self._clock = device, clock
        self._marks: list[tuple[str, Any, bool]] = []
        self._part = OUTSIDE

    def enter(self, part: str) -> str:
        """Begins `part`; returns the part before."""
        return self._mark(part, begins=False)

    def begin_step(self) -> None:
        """Begins a step, with waiting for its data; the one before ends."""
        self._mark(DATA, begins=True)

    def end(self) -> None:
        """Ends the last step."""
        self._mark(OUTSIDE, begins=False)

    def _mark(self, part: str, begins: bool) -> str:
        before, self._part = self._part, part
        self._marks.append((part, now(self.device) if self._clock is None else self._clock(), begins))
        return before

    def cut(self) -> list[dict[str, float]]:
        """Milliseconds of each part of each step since the last cut, in order of first appearance."""
        steps: list[dict[str, float]] = []
        for (part, start, begins), (_, end, _) in zip(self._marks, self._marks[1:], strict=False):
            if begins:
                steps.append({})
            if part != OUTSIDE:
                steps[-1][part] = steps[-1].get(part, 0.0) + milliseconds(start, end)
        self._marks.clear()
        return steps


def now(device: torch.device) -> Any:
    """A mark of this moment on the device's own time line."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Milliseconds between two moments of `now`; on a GPU it waits until the second has come."""
    if isinstance(start, float):
        return 1000 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


class Marked(nn.Module):
    """`inner` with its forward as one part of the line, and with what comes before its own backward as the end of another's."""

    def __init__(self, inner: nn.Module, line: Line, part: str, backward: str | None = None) -> None:
        super().__init__()
        self.inner, self.line, self.part, self.backward_part = inner, line, part, backward

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *arguments: Any) -> Any:
        """The output of `inner`, unchanged."""
        before = self.line.enter(self.part)
        output = self.inner(*arguments)
        self.line.enter(before)
        if self.backward_part is not None:
            for tensor in tensors_of(output):
                if tensor.requires_grad:
                    tensor.register_hook(partial(_entered, self.line, self.backward_part))
        return output


def _entered(line: Line, part: str, *_: Any) -> None:
    """A hook: what it is called with is none of its business, and what it returned would replace that."""
    line.enter(part)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(inner)


def within(line: Line, part: str, function: Callable) -> Callable:
    """`function`, whose time is `part`'s."""

    def bracketed(*arguments: Any, **options: Any) -> Any:
        before = line.enter(part)
        try:
            return function(*arguments, **options)
        finally:
            line.enter(before)

    return bracketed


class Communication:
    """DDP's gradient buckets: how many bytes each, and when the last of them is on its way."""

    def __init__(self, run: Run) -> None:
        self.line: Line | None = None
        self.buckets: list[int] = []
        """Bytes of each bucket since somebody cleared the list."""
        if isinstance(run.distiller, DistributedDataParallel):
            # a lambda, because DDP checks a function's annotations and these are text
            run.distiller.register_comm_hook(None, lambda group, bucket: self._reduce(group, bucket))

    def _reduce(self, group: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP's own all-reduce, with a note of it: what follows the last bucket is waiting for the network."""
        self.buckets.append(bucket.buffer().nbytes)
        if bucket.is_last() and self.line is not None:
            self.line.enter(ALL_REDUCE)
        return allreduce_hook(group, bucket)


@contextmanager
def marked(run: Run, line: Line, communication: Communication) -> Iterator[None]:
    """Lets the run's steps set their marks on `line` while it is open."""
    distiller, accelerator = run.unwrapped, run.accelerator
    student, teacher, transform = distiller.student, run.teacher, run.transform
    criteria = dict(distiller.criteria.items())
    distiller.student = Marked(student, line, FORWARD, BACKWARD)
    for name, criterion in criteria.items():
        distiller.criteria[name] = Marked(criterion, line, loss_part(name), loss_part(name, backward=True))
    join = distiller.before_losses
    if teacher is not None:
        run.teacher = Marked(teacher, line, TEACHER)
        distiller.before_losses = within(line, TEACHER, join)  # beside the student's, what is left of it when that is through
    run.transform = within(line, TRANSFORM, transform)
    # instance attributes hide the methods, and go again below
    accelerator.backward = within(line, REST, accelerator.backward)
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)  # inside Accelerate's
    handles = [
        optimizer.register_step_pre_hook(partial(_entered, line, OPTIMISER)),
        optimizer.register_step_post_hook(partial(_entered, line, REST)),
    ]
    if run.average is not None:
        run.average.update = within(line, AVERAGE, run.average.update)
    communication.line = line
    try:
        yield
    finally:
        communication.line = None
        distiller.student, run.teacher, run.transform = student, teacher, transform
        distiller.before_losses = join
        for name, criterion in criteria.items():
            distiller.criteria[name] = criterion
        del accelerator.backward
        for handle in handles:
            handle.remove()
        if run.average is not None:
            del run.average.update


def endless(loader: Loader) -> Iterator[Batch]:
    """The loader's batches, epoch after epoch."""
    for epoch in count():
        yield from loader.epoch(epoch)


def make_steps(run: Run, stream: Iterator[Batch], steps: int, line: Timeline) -> None:
    """Makes optimiser steps as training makes them; each begins on the line with waiting for its data."""
    for _ in range(steps):
        line.begin_step()
        batches = list(islice(stream, run.settings.accumulate))
        line.enter(REST)
        train_step(run, batches, logged=False)
        run.counters.step += 1
        run.after_step()
    line.end()
