"""What the loaders have in common: the task that a loader is made for, and all of a loader but its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import EvalPlan, Plan, TrainPlan, Views
from distill.data.dali_graph import DecodeMode
from distill.data.faults import Quarantine
from distill.data.index import ShardIndex
from distill.data.order import Lanes
from distill.data.prefetch import prefetched
from distill.data.stream import Position
from distill.protocols import Batch, InputSpec

LoaderName = Literal["dali", "reference"]


class TeacherRows(Protocol):
    """What was computed of the teacher ahead of training, by view and sample; read by a loader's threads with the images."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that its rows depend on, as plain JSON: it joins the identity of the stream."""
        ...

    def read(self, view: int, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """uint8 [B, bytes]: the rows of these samples in this view. Raises where a row is not whole."""
        ...


@dataclass(frozen=True)
class Task:
    """The work of one loader: the batches of `plan` from the split `index`, onto `device`. A loader is made of it alone, as in
    `DaliLoader(train_task(index, ...))`."""

    index: ShardIndex
    plan: Plan
    quarantine: Quarantine
    device: torch.device
    num_threads: int
    """Threads for decoding and what follows."""
    decode: DecodeMode | None = None
    """How DALI decodes; None is its default on the device."""
    teacher: TeacherRows | None = None

    def teacher_rows(self, position: Position, samples: NDArray[np.int64]) -> Tensor | None:
        """uint8 [B, bytes]: the teacher's rows of the samples that this batch really shows; None where the teacher is live."""
        if self.teacher is None:
            return None
        return torch.from_numpy(self.teacher.read(self.plan.view(position), samples))


class PlannedLoader:
    """A `Loader` but for `close` and the batch at a position, which subclasses add.

    A base class with behaviour: a run's resuming hangs on both loaders giving the same identity,
    refusing the same states and counting the same bad samples, so that is written once.
    """

    def __init__(self, task: Task, take: Callable[[Position], Batch]) -> None:
        """take: gives the batch at a position, on the host or the task's device."""
        self.num_samples = task.index.num_samples
        self.batches_per_epoch = task.plan.batches_per_epoch
        self.quarantine = task.quarantine
        self.task = task
        self._take = take
        # one for all epochs: memory is kept by stream
        self.copying = torch.cuda.Stream(task.device) if task.device.type == "cuda" else None
        """The stream on which batches come to the device; None on a CPU."""

    @property
    def bad_samples(self) -> list[int]:
        """Samples that this process knows to be bad, sorted."""
        return self.quarantine.samples()

    def state(self) -> dict[str, Any]:
        """The stream but for its position, as plain JSON: the hash of the index, what the order depends on, the bad samples."""
        return {**self._identity(), "bad_samples": self.bad_samples}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the bad samples of a state. Raises ValueError for one of another stream, TooManyFaults above the limit."""
        own = self._identity()
        named = dict.fromkeys([*own, *state])  # of both: each order has parameters of its own
        del named["bad_samples"]
        different = [
            f"{name} {state.get(name, 'not set')} there, {own.get(name, 'not set')} here"
            for name in named
            if state.get(name) != own.get(name)
        ]
        if different:
            raise ValueError(
                f"{self.task.index.place}: the saved state is of another stream ({'; '.join(different)}); "
                "go on with the data and settings it was saved with, or start anew"
            )
        self.quarantine.update(state["bad_samples"])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of this epoch from number `start` on."""
        positions = (Position(epoch, micro) for micro in range(start, self.batches_per_epoch))
        yield from prefetched(map(self._at, positions), self.copying)

    def _at(self, position: Position) -> Batch:
        batch, plain = self._take(position), self.task.plan.plain(position)
        return batch if plain is None else batch._replace(plain=torch.from_numpy(plain))

    def _identity(self) -> dict[str, Any]:
        teacher = {} if self.task.teacher is None else self.task.teacher.identity
        return {"index": self.task.index.digest, **self.task.plan.identity, **teacher}


def train_task(
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
    repeats: int = 1,
    plain_repeats: int = 0,
    lanes: Lanes | None = None,
    max_bad_rate: float = 1e-4,
    fault_report: Path | None = None,
    decode: DecodeMode | None = None,
    views: Views | None = None,
    teacher: TeacherRows | None = None,
) -> Task:
    """The training batches of process `rank`: `global_batch_size // (accumulate * world_size)` images of `size` each.

    `max_bad_rate` is the share of the split that may turn out bad; `fault_report` gets a JSON line for each bad sample;
    `decode` and `teacher` as in `Task`, `plain_repeats` and `views` as in `TrainPlan`. Raises ValueError where a shard is not
    the indexed one, and where the global batch does not divide or is not filled.
    """
    index.spot_check()
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
        repeats=repeats,
        plain_repeats=plain_repeats,
        lanes=lanes,
        views=views,
    )
    return Task(index, plan, Quarantine(index, max_bad_rate, rank, fault_report), device, num_threads, decode, teacher)


def eval_task(
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
    decode: DecodeMode | None = None,
) -> Task:
    """The evaluation batches of process `rank`: every sample of the split once over all ranks, resized and cropped as timm
    does. `max_bad_rate`, `fault_report`, `decode` and errors as in `train_task`."""
    index.spot_check()
    plan = EvalPlan(index.num_samples, spec=spec, batch_size=batch_size, rank=rank, world_size=world_size)
    return Task(index, plan, Quarantine(index, max_bad_rate, rank, fault_report), device, num_threads, decode)
