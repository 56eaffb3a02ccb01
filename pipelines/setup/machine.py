"""The machine that a recipe runs on: processes, precision, memory, threads."""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers

from distill.config import RecipeError
from distill.data import order
from distill.recipe import Recipe

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""


def create_accelerator(precision: str, **options: Any) -> Accelerator:
    """Accelerate in a precision, which is the launcher's for `auto`. RecipeError for one that this machine has not."""
    try:
        accelerator = Accelerator(mixed_precision=None if precision == "auto" else precision, **options)
    except ValueError as error:
        raise RecipeError(f"mixed_precision: {precision} cannot be had on this machine: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # on a CPU Accelerate would say fp16 and compute in float32
        raise RecipeError(f"mixed_precision: fp16 needs a GPU, and this is a {accelerator.device.type}; take bf16 or no")
    return accelerator


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate with the recipe's precision; processes, nodes and devices are the launcher's business.

    RecipeError for trackers or a precision that this machine has not, and for accumulation that the launcher sets.
    """
    unknown = [t for t in recipe.report.trackers if t not in {str(a) for a in get_available_trackers()}]
    if unknown:
        names = ", ".join(sorted(str(a) for a in get_available_trackers()))
        raise RecipeError(f"report.trackers: {', '.join(unknown)} cannot be had; installed here: {names or 'none'}")
    accelerator = create_accelerator(
        recipe.train.mixed_precision,
        log_with=list(recipe.report.trackers) or None,
        project_dir=recipe.out,
        kwargs_handlers=[
            # no static_graph: with accumulation its first step ends in an internal assertion of PyTorch's (a micro-batch
            # under no_sync comes first), and what it saves, the search for unused parameters, is off anyway
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            # longer than the watchdog's time, which says more; this one is the net below it
            InitProcessGroupKwargs(timeout=timedelta(minutes=2 * recipe.train.timeout_minutes)),
        ],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError(
            f"the launcher sets gradient accumulation to {accelerator.gradient_accumulation_steps}; it belongs to the recipe:"
            " launch without it and say --train.accumulate"
        )
    return accelerator


def keep_freed_memory() -> bool:
    """Keeps memory that tensors give back in the process, for those of the next step of a training on a CPU.

    glibc hands large blocks back to the system at once and gets them again page by page, zeroed: 5 to 9 % of a step here, for
    8 to 20 % more resident memory. False where nothing was changed: another C library, or an allocator that the user chose
    (MALLOC_*, GLIBC_TUNABLES or LD_PRELOAD in the environment).
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # an old glibc refuses thresholds above 32 MiB
    raised = any(mallopt(M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25))
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1)) and raised


def memory_format(recipe: Recipe) -> torch.memory_format:
    """PyTorch's name for the recipe's memory format."""
    return torch.channels_last if recipe.train.channels_last else torch.contiguous_format


def micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Images per process and micro-batch. Raises RecipeError with the numbers where the global batch does not divide."""
    try:
        return order.micro_batch_size(recipe.train.global_batch_size, recipe.train.accumulate, world_size)
    except ValueError as error:
        raise RecipeError(f"train.global_batch_size: {error}") from None


def num_threads(asked: int) -> int:
    """Decoding threads of this process: as many as asked for, or for 0 this process's share of the machine's cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return asked or max(1, len(os.sched_getaffinity(0)) // local)
