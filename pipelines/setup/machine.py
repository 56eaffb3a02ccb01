"""The machine that a recipe runs on: processes, precision, memory, threads."""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from distill.config import RecipeError
from distill.data import order
from distill.recipe import Recipe
from pipelines.setup.switches import set_switches

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, from glibc's malloc.h."""


CONFIG = Path(__file__).parents[2] / "accelerate_config.yaml"
DRIVER = Path("/proc/driver/nvidia/version")
"""Where Linux names the NVIDIA driver that is loaded."""


def check_processes(local: int, world: int, gpus: int) -> None:
    """Raises RecipeError where a launcher's processes cannot each have a GPU of this machine.

    local: its processes on this machine; world: all of them; gpus: those of this machine that PyTorch can use. Accelerate would
    put two processes on one GPU, which NCCL refuses late; without a GPU each would be rank 0 of 1, alone on the CPU.
    """
    if world == 1 or 0 < local <= gpus:
        return
    command = shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    machines = max(1, world // max(1, local))
    if gpus:
        several = f"--num_machines {machines} --machine_rank N --main_process_ip HOST " if machines > 1 else ""
        raise RecipeError(
            f"{local} processes were started on a machine with {gpus} usable GPU{'s' * (gpus > 1)}; each needs one of its own:"
            f" accelerate launch --config_file {os.path.relpath(CONFIG)} {several}--num_processes {gpus * machines} {command}"
        )
    raise RecipeError(
        f"{world} processes were started, and {why_no_gpu()}: each would run alone on the CPU. One process: python {command}"
        f" ; several on the CPU: ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node {local} {command}"
    )


def why_no_gpu() -> str:
    """The likely reason why PyTorch finds no GPU, with the versions that decide it."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is not built for CUDA"
    built = f"PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"{built} among CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}"
    if not DRIVER.is_file():
        return f"{built}: no NVIDIA driver is loaded"
    driver = DRIVER.read_text().splitlines()[0].removeprefix("NVRM version: ")
    return f"{built}: the driver ({' '.join(driver.split())}) may be too old for it"


def check_launcher() -> None:
    """Raises RecipeError where the launcher's processes do not fit this machine's GPUs; see `check_processes`."""
    if not parse_flag_from_env("ACCELERATE_USE_CPU"):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        check_processes(local_processes(), world, torch.accelerator.device_count())


def create_accelerator(precision: str, **options: Any) -> Accelerator:
    """Accelerate in a precision, which is the launcher's for `auto`. RecipeError for one that this machine has not, and for
    more processes than it has GPUs."""
    check_launcher()
    try:
        accelerator = Accelerator(mixed_precision=None if precision == "auto" else precision, **options)
    except ValueError as error:
        raise RecipeError(f"mixed_precision: {precision} cannot be had on this machine: {error}") from None
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        # on a CPU Accelerate would say fp16 and compute in float32
        raise RecipeError(f"mixed_precision: fp16 needs a GPU, and this is a {accelerator.device.type}; take bf16 or no")
    return accelerator


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate with the recipe's precision and switches; processes, nodes and devices are the launcher's business.

    RecipeError for trackers, processes or a precision that this machine has not, and for accumulation that the launcher sets.
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
            InitProcessGroupKwargs(timeout=collective_timeout(recipe)),
        ],
    )
    if accelerator.scaler is not None and recipe.optim.name == "dot":
        raise RecipeError("optim.name: dot keeps a gradient that fp16's scaler does not know; take mixed_precision bf16 or no")
    train = recipe.train
    set_switches(accelerator.device, train.tf32, train.cudnn_benchmark, train.deterministic)
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError(
            f"the launcher sets gradient accumulation to {accelerator.gradient_accumulation_steps}; it belongs to the recipe:"
            " launch without it and say --train.accumulate"
        )
    return accelerator


def collective_timeout(recipe: Recipe) -> timedelta:
    """The longest that a collective waits: longer than the watchdog, which says more; this one is the net below it."""
    return timedelta(minutes=2 * recipe.train.timeout_minutes)


def meet() -> None:
    """Waits until every process has come here.

    Accelerate's own names a GPU for it, for processes of a CPU too: two of them on a machine with one GPU ended in "invalid
    device ordinal".
    """
    state = PartialState()
    if state.num_processes > 1:
        torch.distributed.barrier(device_ids=[state.device.index] if state.device.type == "cuda" else None)


def of_main_process(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What `act` gives on the main process, on every process; what it raises, likewise."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = act()
        except Exception as error:
            answer[1] = error
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def leave_together(wait: Callable[[], Any]) -> None:
    """Tears the process groups down, where every process comes here: at a clean end, and at a stop that all agreed on.

    What is left of NCCL when the interpreter ends may hang it, or abort it with another exit code. wait: a collective, so that
    rank 0, which keeps the store, does not leave before the others; where it fails a process is gone, and all is left as it is.
    """
    try:
        wait()
    except RuntimeError:
        return
    PartialState().destroy_process_group()


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


def micro_batch_of(recipe: Recipe, world_size: int) -> int:
    """Images per process and micro-batch of a recipe. Raises RecipeError where the global batch does not divide."""
    try:
        return order.micro_batch_size(recipe.train.global_batch_size, recipe.train.accumulate, world_size)
    except ValueError as error:
        raise RecipeError(f"train.global_batch_size: {error}") from None


def local_processes() -> int:
    """Processes of the run on this node, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_nodes(world_size: int) -> int:
    """Nodes of a run of so many processes."""
    return -(-world_size // local_processes())


def num_threads(asked: int) -> int:
    """Decoding threads of this process: as many as asked for, or for 0 this process's share of the machine's cores."""
    return asked or max(1, len(os.sched_getaffinity(0)) // local_processes())
