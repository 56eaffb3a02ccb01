"""Advice where a step does not fit into the device's memory."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.models.backbone import Backbone
from distill.models.recompute import activation_bytes, set_activation_checkpointing
from distill.recipe import Recipe
from distill.run import Run
from pipelines.setup.machine import micro_batch_of
from pipelines.setup.models import Models

USABLE = 0.9
"""Share of a device's memory that a step can fill: the rest goes to the context, to workspaces and to fragmentation."""


class OutOfMemory(RuntimeError):
    """A step does not fit into the device; the text says what would."""


class MemoryEstimate(NamedTuple):
    """Memory that one process of a run needs, in bytes, computed and not measured."""

    fixed: int
    """Weights, gradients and optimiser state."""
    image: int
    """What the student keeps of an image for the backward pass, in float32."""
    checkpointed: int | None
    """What it would keep with activation checkpointing; None where the model has none, or where it is on already."""


@contextmanager
def memory_explained(recipe: Recipe, run: Run, models: Models) -> Iterator[None]:
    """Raises OutOfMemory where the device's memory is not enough inside: it says which batch, precision or option would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        capacity = capacity_of(run.accelerator.device)
        asked = recipe.train.mixed_precision if recipe.train.mixed_precision != "auto" else run.accelerator.mixed_precision
        advice = advise(recipe, run.accelerator.num_processes, estimate_memory(run, models), capacity, str(asked))
        raise OutOfMemory(f"rank {run.accelerator.process_index}: {str(error).splitlines()[0]}; {advice}") from error


def capacity_of(device: torch.device) -> int:
    """Bytes of the device's memory that this process may take."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(device))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def estimate_memory(run: Run, models: Models) -> MemoryEstimate:
    """The estimate for this run, computed without any of the device's memory: there is none left to try it."""
    trained = [p for p in run.distiller.parameters() if p.requires_grad]
    # weights, gradients, and as much again for each tensor that the optimiser keeps per weight
    per_weight = 2 + max((len(s) for s in run.optimizer.state.values()), default=1)
    held = [models.teacher] if models.teacher is not None else []
    held += [run.average] if run.average is not None else []
    fixed = per_weight * _bytes_of(trained) + sum(_bytes_of(list(module.parameters())) for module in held)
    checkpointed = None
    with FakeTensorMode() as fake:
        image = activation_bytes(weightless(models.student, fake))
        if not getattr(models.student.model, "grad_checkpointing", False):
            with suppress(ValueError):
                _, checkpointed = set_activation_checkpointing(weightless(models.student, fake))
    return MemoryEstimate(fixed, image, checkpointed)


def weightless(backbone: Backbone, fake: FakeTensorMode) -> Backbone:
    """A copy that computes shapes only and has no memory of its own."""
    memo: dict[int, object] = {id(t): fake.from_tensor(t) for t in (*backbone.buffers(), *backbone.parameters())}
    return copy.deepcopy(backbone, memo)


def _bytes_of(tensors: list[nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def advise(recipe: Recipe, processes: int, found: MemoryEstimate, capacity: int, precision: str) -> str:
    """The estimate in one line, and each single change that makes it fit, in the order of what it costs."""
    batch = micro_batch_of(recipe, processes)
    half = precision in ("bf16", "fp16")
    image = found.image // 2 if half else found.image
    need = found.fixed + batch * image
    estimate = (
        f"a micro-batch of {batch} is estimated at {need / 2**30:.2f} of {capacity / 2**30:.2f} GiB"
        f" ({image / 2**20:.1f} MiB an image)"
    )
    room = USABLE * capacity - found.fixed
    if room <= 0:
        return f"{estimate}; weights and optimiser state alone fill it: take a smaller teacher or student"
    if batch * image <= room:
        return f"{estimate}, which would fit: something else holds memory of this device"
    options = []
    fitting = [k for k in range(2, batch + 1) if batch % k == 0 and batch // k * image <= room]
    if fitting:
        accumulate = recipe.train.accumulate * fitting[0]
        options.append(f"--train.accumulate {accumulate} (micro-batch {batch // fitting[0]})")
    if not half and batch * image / 2 <= room:
        options.append("--train.mixed_precision bf16")
    if found.checkpointed is not None and batch * found.checkpointed / (2 if half else 1) <= room:
        options.append("--student.checkpoint_activations true")
    return f"{estimate}; what would fit: {', or '.join(options) if options else 'more processes, or a smaller image_size'}"
