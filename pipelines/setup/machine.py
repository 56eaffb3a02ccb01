"""What a recipe gets of the machine it runs on: processes, precision, threads."""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers

from distill.config import RecipeError
from distill.recipe import Recipe

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate with the recipe's precision; processes, nodes and devices are the launcher's business."""
    unknown = [t for t in recipe.report.trackers if t not in {str(a) for a in get_available_trackers()}]
    if unknown:
        names = ", ".join(sorted(str(a) for a in get_available_trackers()))
        raise RecipeError(f"report.trackers: {', '.join(unknown)} cannot be had; installed here: {names or 'none'}")
    asked: str = recipe.train.mixed_precision
    if asked == "auto":
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    fp16_on_cpu = asked == "fp16" and not torch.cuda.is_available()
    # longer than the watchdog's, which says more; this one is the net below it
    timeout = timedelta(minutes=2 * recipe.train.timeout_minutes)
    try:
        accelerator = Accelerator(
            mixed_precision="no" if fp16_on_cpu else asked,
            log_with=list(recipe.report.trackers) or None,
            project_dir=recipe.out,
            kwargs_handlers=[
                # no static_graph: with accumulation its first step ends in an internal assertion of PyTorch's (a micro-batch
                # under no_sync comes first), and what it saves, the search for unused parameters, is off anyway
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=timeout),
            ],
        )
    except ValueError as error:
        raise RecipeError(f"train.mixed_precision: {asked!r} cannot be had on this machine: {error}") from None
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError(
            f"the launcher sets gradient accumulation to {accelerator.gradient_accumulation_steps}; it belongs to the recipe:"
            " launch without it and say --train.accumulate"
        )
    if fp16_on_cpu:
        # Accelerate makes a scaler for accelerators only, PyTorch has one for CPUs too: slow, but the same arithmetic,
        # and so what fp16 does to a run can be tried without a GPU
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator


def keep_freed_memory() -> bool:
    """For training on a CPU: memory that tensors give back stays with the process, for those of the next step.

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
    total, accumulate = recipe.train.global_batch_size, recipe.train.accumulate
    if total % (world_size * accumulate):
        raise RecipeError(
            f"train.global_batch_size: {total} is not divisible by {world_size} processes x accumulate {accumulate}"
            f" = {world_size * accumulate}"
        )
    return total // (world_size * accumulate)


def num_threads(asked: int) -> int:
    """Decoding threads of this process: as many as asked for, or for 0 this process's share of the machine's cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return asked or max(1, len(os.sched_getaffinity(0)) // local)
