"""What the two loaders have in common: how their arguments become a plan and a quarantine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from distill.data.augment import TrainTransform
from distill.data.faults import Quarantine
from distill.data.index import ShardIndex
from distill.data.plan import EvalPlan, Plan, TrainPlan
from distill.protocols import InputSpec

L = TypeVar("L")
Kind = Callable[[ShardIndex, TrainPlan | EvalPlan, Quarantine, torch.device, int], L]


def train_loader(
    kind: Kind[L],
    index: ShardIndex,
    *,
    size: tuple[int, int],
    transform: TrainTransform,
    global_batch_size: int,
    accumulate: int,
    rank: int,
    world_size: int,
    seed: int,
    device: torch.device,
    num_threads: int,
    shuffle_block: int = 0,
    max_bad_rate: float = 1e-4,
    fault_report: Path | None = None,
) -> L:
    """Training batches of process `rank`: `global_batch_size // (accumulate * world_size)` images of `size` each."""
    plan = TrainPlan(
        index.num_samples,
        size=size,
        transform=transform,
        global_batch_size=global_batch_size,
        accumulate=accumulate,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shuffle_block=shuffle_block,
    )
    return kind(index, plan, Quarantine(index, max_bad_rate, rank, fault_report), device, num_threads)


def eval_loader(
    kind: Kind[L],
    index: ShardIndex,
    *,
    spec: InputSpec,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    num_threads: int,
    max_bad_rate: float = 1e-4,
    fault_report: Path | None = None,
) -> L:
    """Evaluation batches: every sample of the split once over all ranks, resized and cropped as timm does."""
    plan = EvalPlan(index.num_samples, spec=spec, batch_size=batch_size, rank=rank, world_size=world_size)
    return kind(index, plan, Quarantine(index, max_bad_rate, rank, fault_report), device, num_threads)


def stream_state(index: ShardIndex, plan: Plan, quarantine: Quarantine) -> dict[str, Any]:
    """A loader's `state`: hash of the index, what the order depends on, bad samples."""
    return {"index": index.digest, **plan.identity, "bad_samples": quarantine.samples()}


def take_over(state: Mapping[str, Any], index: ShardIndex, plan: Plan, quarantine: Quarantine) -> None:
    """A loader's `restore`. Raises ValueError where the state is of another stream, TooManyFaults above the limit."""
    own = {"index": index.digest, **plan.identity}
    different = [f"{name} {state.get(name)} there, {value} here" for name, value in own.items() if state.get(name) != value]
    if different:
        raise ValueError(
            f"{index.folder}: the saved state is of another stream ({'; '.join(different)}); "
            "go on with the data and settings it was saved with, or start anew"
        )
    quarantine.update(state["bad_samples"])
