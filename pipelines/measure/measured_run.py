"""The run that `pipelines/benchmark.py` measures: a recipe's models and data, and the line on which its steps are marked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch

from distill.agreement import Control
from distill.command_line import requests
from distill.protocols import Batch
from distill.recipe import Recipe
from distill.teacher_cache.teacher import CachedTeacher
from pipelines.measure.memory import Arrivals, MemoryTimeline, memory_use
from pipelines.measure.report import MemoryUse, Traffic, WarmUp
from pipelines.measure.timeline import Communication, Timeline, endless, make_steps, marked
from pipelines.setup.build import build
from pipelines.setup.data import Splits, build_splits, check_mixing
from pipelines.setup.machine import build_accelerator, collective_timeout, micro_batch_of
from pipelines.setup.observers import compile_report

IN_MEMORY = 2
"""Global batches that take turns with `--data memory`."""


class Asked(NamedTuple):
    """What `pipelines/benchmark.py` was asked for."""

    recipe: Recipe
    steps: int
    warm_up: int
    rounds: int
    data: str
    clock: str
    json: Path | None
    plot: Path | None


def measurable(recipe: Recipe, out: str) -> Recipe:
    """The recipe without what is no part of a plain step: logs, trackers, profiles, and weights from elsewhere."""
    teacher, student = recipe.teacher, recipe.student
    if teacher.weights in ("pretrained", "train") and not teacher.cache:  # a cache is of these weights
        teacher = dataclasses.replace(teacher, weights="random", class_map=None)
    if student.initial_weights == "pretrained":
        student = dataclasses.replace(student, initial_weights="random")
    report = dataclasses.replace(recipe.report, log_every=10**9, trackers=(), gradient_shares=False, profile_steps=0)
    return dataclasses.replace(recipe, out=out, teacher=teacher, student=student, report=report)


class MeasuredRun:
    """A run, its models and data, and the line on which its steps set their marks."""

    def __init__(self, asked: Asked, out: str) -> None:
        self.asked, self.recipe = asked, measurable(asked.recipe, out)
        self.accelerator = build_accelerator(self.recipe)
        self.batch = micro_batch_of(self.recipe, self.accelerator.num_processes)
        check_mixing(self.recipe, self.batch)
        with requests():
            self.splits: Splits = build_splits(self.recipe, self.accelerator)
            self.run, self.models = build(self.recipe, self.accelerator, self.splits, Control(collective_timeout(self.recipe)))
        self.run.eval_loader.close()
        self.run.distiller.train()
        self.row_bytes = self.run.teacher.codec.row.itemsize if isinstance(self.run.teacher, CachedTeacher) else 0
        """Bytes of an entry of the teacher cache; 0 where the teacher is live."""
        self.communication = Communication(self.run)
        self.line = Timeline(self.accelerator.device, time.process_time if asked.clock == "cpu" else None)
        self.stream = self._stream()

    def _stream(self) -> Iterator[Batch]:
        stream = endless(self.run.train_loader)
        if self.asked.data == "memory":
            return cycle(list(islice(stream, IN_MEMORY * self.run.settings.accumulate)))
        return stream

    def steps(self, count: int, marks: bool = False, local: bool = False) -> list[dict[str, float]]:
        """Milliseconds of each part of `count` steps; without marks a step has two parts, with `local` nothing is reduced."""
        if local:
            with self.accelerator.no_sync(self.run.distiller):
                return self.steps(count)
        if marks:
            with marked(self.run, self.line, self.communication):
                make_steps(self.run, self.stream, count, self.line)
        else:
            make_steps(self.run, self.stream, count, self.line)
        return self.line.cut()

    def warm_up(self) -> WarmUp:
        """The first steps, on which compilers, allocators and DDP's buckets settle."""
        taken = []
        for _ in range(self.asked.warm_up):
            begin = time.perf_counter()  # compilers work on the host, in processes of their own
            self.steps(1)
            taken.append(time.perf_counter() - begin)
        compiles = self.recipe.train.compile != "none"
        extra = 1000 * max(0.0, taken[0] - taken[-1]) if compiles and len(taken) > 1 else None
        return WarmUp(len(taken), sum(taken), 1000 * taken[0], extra, compile_report() if compiles else "")

    def memory_and_traffic(self) -> tuple[MemoryUse, Traffic]:
        """The memory and the traffic of a step, seen in two steps that are not measured."""
        line = MemoryTimeline(self.run)
        with marked(self.run, line, self.communication), torch.autograd.graph.saved_tensors_hooks(line.pack, lambda t: t):
            make_steps(self.run, self.stream, 1, self.line)
        memory = memory_use(self.run, line)
        arrivals = Arrivals(self.accelerator.device)
        self.communication.buckets.clear()
        with arrivals.observe(self.run):
            make_steps(self.run, self.stream, 1, self.line)
        self.line.cut()
        train = self.splits.train
        trained = [p for p in self.run.distiller.parameters() if p.requires_grad]
        traffic = Traffic(
            gradient_bytes=sum(p.nbytes for p in trained),
            buckets=list(self.communication.buckets),
            arrivals=arrivals.timetable(),
            gathers={name: list(each.traffic()) for name, each in self.models.criteria.items() if each.traffic()},
            bytes_per_image=float(train.records["size"].mean()) + self.row_bytes,
            training_images=train.num_samples,
        )
        return memory, traffic
