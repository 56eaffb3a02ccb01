"""Memory by owner and gradients as they come, seen in steps that are not measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.run import Run
from pipelines.measure.report import MemoryUse
from pipelines.measure.timeline import OUTSIDE, TRANSFORM, milliseconds, now, tensors_of

CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class MemoryTimeline:
    """Memory along the parts of a step, as `Timeline` has time: what autograd saves in each, and the highest mark seen."""

    def __init__(self, run: Run) -> None:
        self._device = run.accelerator.device
        self._part = OUTSIDE
        models = [m for m in (run.teacher, run.distiller) if m is not None]
        # weights are saved for the backward too, and are counted where they belong
        self._weights = {_place(t) for model in models for t in _state(model)}
        self._seen = set(self._weights)
        self.saved: dict[str, int] = defaultdict(int)
        self.peaks: dict[str, int] = defaultdict(int)

    def enter(self, part: str) -> str:
        """Closes the part before with its peak."""
        self.peaks[self._part] = max(self.peaks[self._part], read_peak(self._device))
        clear_peak(self._device)
        if part == TRANSFORM:  # the next micro-batch: what the one before saved is gone, and its places are used again
            self.saved.clear()
            self._seen = set(self._weights)
        before, self._part = self._part, part
        return before

    def pack(self, tensor: Tensor) -> Tensor:
        """Notes a tensor that autograd saves; the tensor."""
        place = _place(tensor)
        if place not in self._seen:
            self._seen.add(place)
            self.saved[self._part] += tensor.untyped_storage().nbytes()
        return tensor


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def clear_peak(device: torch.device) -> None:
    """Lets the highest mark start again from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def read_peak(device: torch.device) -> int:
    """Bytes at the highest mark: the allocator's on a GPU, the resident set's on a CPU; 0 where the system does not tell."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")


def status(field: str) -> int:
    """Bytes of a figure of /proc/self/status, given there in KiB."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def memory_use(run: Run, line: MemoryTimeline) -> MemoryUse:
    """The memory of a step that ran with `marked(run, line)` and autograd's `line.pack`."""
    distiller, optimizer = run.unwrapped, run.optimizer
    trained = [p for p in distiller.parameters() if p.requires_grad]
    owners = {
        "teacher weights": 0 if run.teacher is None else _bytes(_state(run.teacher)),
        "student weights": _bytes(_state(distiller.student)),
        "losses' weights": _bytes(_state(distiller.criteria)),
        "gradients": _bytes(trained),
        "optimiser state": _bytes(tensors_of(list(optimizer.state.values()))),
        "weight average": 0 if run.average is None else _bytes(_state(run.average)),
        **{f"saved by {part or 'the rest'}": size for part, size in line.saved.items()},
    }
    peaks = {part: size for part, size in line.peaks.items() if part != OUTSIDE}
    part = max(peaks, key=lambda name: peaks[name])
    return MemoryUse(peaks[part], part, {name: size for name, size in owners.items() if size})


def _state(module: nn.Module) -> Iterator[Tensor]:
    yield from (*module.parameters(), *module.buffers())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({_place(t): t.untyped_storage().nbytes() for t in tensors}.values())


class Arrivals:
    """The moments at which the gradients of the last backward pass arrived."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: Any = None
        self._end: Any = None
        self._moments: dict[int, tuple[Any, int]] = {}

    @contextmanager
    def observe(self, run: Run) -> Iterator[None]:
        """Notes backward passes while it is open."""
        backward = run.accelerator.backward

        def noted(*arguments: Any) -> None:
            self._moments.clear()
            self._start = now(self._device)
            backward(*arguments)
            self._end = now(self._device)

        trained = [p for p in run.distiller.parameters() if p.requires_grad]
        handles = [p.register_post_accumulate_grad_hook(partial(self._note, number)) for number, p in enumerate(trained)]
        run.accelerator.backward = noted
        try:
            yield
        finally:
            del run.accelerator.backward
            for handle in handles:
                handle.remove()

    def _note(self, number: int, parameter: Tensor) -> None:
        self._moments[number] = (now(self._device), parameter.nbytes)

    def timetable(self) -> list[tuple[float, int]]:
        """(share of the backward pass that was over, bytes) of each gradient, in order of arrival."""
        whole = milliseconds(self._start, self._end)
        return [(min(1.0, milliseconds(self._start, moment) / whole), size) for moment, size in self._moments.values()]
