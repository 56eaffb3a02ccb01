"""The ceiling of a step: each model alone on random tensors, the loader alone, copies, a matrix product."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.models.describe import flops_of
from distill.optim import create_optimizer
from distill.recipe import Recipe
from distill.run import Run
from pipelines.measure.timeline import BACKWARD, FORWARD, OPTIMISER, REST, TEACHER, Timeline, endless
from pipelines.setup.machine import memory_format
from pipelines.setup.models import Models
from pipelines.setup.observers import mark_step

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUEUED = 7
"""Batches that a loader may have ready before anybody asks: those are not its speed."""


class Alone:
    """Teacher forward, student forward, backward and optimiser on random tensors: plain timm models without regions or losses,
    under the run's precision, memory format and compiler."""

    def __init__(self, recipe: Recipe, run: Run, models: Models, batch: int) -> None:
        self._run = run
        self._student = self._ready(copy.deepcopy(models.student.model).train(), recipe, "student")
        self._images = self._pixels(models.student, batch, memory_format(recipe))
        self._frozen = models.teacher
        self._teacher, self._teacher_images = None, self._images
        if models.teacher is not None:
            self._teacher = self._ready(copy.deepcopy(models.teacher.backbone.model).eval(), recipe, "teacher")
            self._teacher_images = self._pixels(models.teacher.backbone, batch, memory_format(recipe))
        self._gradient: Tensor | None = None
        optim = recipe.optim
        self._optimizer = create_optimizer(
            self._student,
            optim.name,
            learning_rate=1e-6,  # the weights stay what they are, and so stay the products of normal size
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            decay_bias_and_norm=optim.decay_bias_and_norm,
            options=optim.options,
        )

    @staticmethod
    def _ready(model: nn.Module, recipe: Recipe, name: str) -> nn.Module:
        if recipe.train.compile in (name, "both"):
            model.compile(mode=recipe.train.compile_mode, dynamic=False)
        return model

    def _pixels(self, model: Backbone, batch: int, chosen: torch.memory_format) -> Tensor:
        spec = model.input_spec
        images = torch.randn(batch, 3, spec.height, spec.width, device=self._run.accelerator.device)
        return images.contiguous(memory_format=chosen)

    def make_steps(self, steps: int, line: Timeline) -> None:
        """Makes `steps` steps of only that work, micro-batches and all, marked on the line."""
        for _ in range(steps):
            line.begin_step()
            mark_step()
            for _ in range(self._run.settings.accumulate):
                self._micro_batch(line)
            line.enter(OPTIMISER)
            self._optimizer.step()
            line.enter(REST)
            self._optimizer.zero_grad()
        line.end()

    def _micro_batch(self, line: Timeline) -> None:
        autocast = self._run.accelerator.autocast
        if self._teacher is not None and self._frozen is not None:
            line.enter(TEACHER)
            with torch.no_grad(), autocast(), self._frozen.autocast(self._run.accelerator.device):
                self._teacher(self._teacher_images)
        line.enter(FORWARD)
        with autocast():
            logits = self._student(self._images)
        if self._gradient is None:
            self._gradient = torch.randn_like(logits) / logits.numel()
        line.enter(BACKWARD)
        logits.backward(self._gradient)

    def flops_per_image(self) -> dict[str, float]:
        """Floating-point operations of the three passes, counted on two images."""
        student = copy.deepcopy(self._student)  # a copy is not compiled, and has its own BatchNorm statistics
        found = {TEACHER: 0.0}
        if self._teacher is not None and self._frozen is not None:
            teacher = copy.deepcopy(self._teacher)
            with torch.no_grad(), self._frozen.autocast(self._images.device):
                found[TEACHER] = flops_of(lambda: teacher(self._teacher_images[:2])) / 2
        found[FORWARD] = flops_of(lambda: student(self._images[:2])) / 2
        both = flops_of(lambda: student(self._images[:2]).sum().backward()) / 2
        return {**found, BACKWARD: both - found[FORWARD]}


def timed(function: Callable[[], object], line: Timeline, repeats: int = 7) -> float:
    """Median milliseconds of a call, after one that does not count."""
    function()
    for _ in range(repeats):
        line.begin_step()
        function()
    line.end()
    return statistics.median(sum(step.values()) for step in line.cut())


class Machine(NamedTuple):
    """Rates of the device when it does nothing else."""

    copy_gigabytes_per_second: float
    """A tensor cloned on the device, bytes read plus bytes written."""
    host_to_device_gigabytes_per_second: float | None
    """Copies from pinned memory; None where host and device are one."""
    teraflops: float
    """A matrix product in the run's precision."""
    teraflops_float32: float


def measure_machine(line: Timeline, precision: str) -> Machine:
    """The device's rates, at sizes that no cache holds: 64 MiB on a CPU, 1 GiB on a GPU; matrices of 1,024 and 8,192 rows."""
    device = line.device
    on_gpu = device.type == "cuda"
    block = torch.ones((2**30 if on_gpu else 2**26) // 4, device=device)
    target = torch.empty_like(block)
    copied = 2 * block.nbytes / 1e6 / timed(lambda: target.copy_(block), line)
    sent = None
    if on_gpu:
        host = torch.ones(2**26, dtype=torch.uint8).pin_memory()
        there = torch.empty_like(host, device=device)
        sent = host.nbytes / 1e6 / timed(lambda: there.copy_(host, non_blocking=True), line)

    def product(dtype: torch.dtype) -> float:
        side = 8192 if on_gpu else 1024
        a = torch.randn(side, side, device=device).to(dtype)
        return 2 * side**3 / 1e9 / timed(lambda: a @ a, line)

    return Machine(copied, sent, product(PRECISIONS[precision]), product(torch.float32))


def loader_rate(run: Run, batches: int) -> float:
    """Images per second and process of the training loader while nothing else runs."""
    stream = endless(run.train_loader)
    for _ in islice(stream, QUEUED):
        pass
    start = time.perf_counter()
    images = sum(len(batch.labels) for batch in islice(stream, batches))
    if run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


class Network(NamedTuple):
    """Rates of the network between the processes when it does nothing else."""

    bandwidth: float
    """Bytes per second that each process sends in an all-reduce of the gradient's size."""
    latency_ms: float
    """Duration of an all-reduce of one number."""


def measure_network(line: Timeline, gradient_bytes: int) -> Network | None:
    """The network's rates; None for one process. A collective: every process calls it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.get_world_size()
    flat, single = (torch.ones(size, device=line.device) for size in (gradient_bytes // 4, 1))
    whole = timed(lambda: dist.all_reduce(flat), line)
    latency = timed(lambda: dist.all_reduce(single), line)
    sent = 2 * (world - 1) / world * flat.nbytes
    return Network(1000 * sent / max(whole - latency, 0.01 * whole), latency)
