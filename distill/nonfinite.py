"""The guard against steps whose loss or gradient is not finite; the host waits for the device only where it must."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distill.agreement import Control

POLL_SECONDS = 0.0005
"""Between two questions to the device: 2 % of a step of 25 ms, and no load on the host."""


class Suspect(NamedTuple):
    """A step that was not made, or may turn out not to have been."""

    step: int
    values: dict[str, Tensor]
    sample_ids: Sequence[Tensor]
    """The sample ids of each of its micro-batches."""


class Outcome(NamedTuple):
    """What became of a step."""

    made: bool
    """False where it was held back; a `deferred` guard does not know yet and says True."""
    held_back: Suspect | None
    """The poisoned step that was not made; None where there is none. A `deferred` guard gives the step before this one."""
    stop: bool
    """Whether any process was asked to stop."""


class _Pending(NamedTuple):
    suspect: Suspect
    flag: Tensor
    """Whether the step was poisoned; on the host once `copied` is done."""
    copied: torch.cuda.Event | None


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser leaves weights and state alone where `found_inf` says so, on the device itself: PyTorch's fused
    ones do, for the sake of fp16's scaler."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
    return bool(getattr(inner, "_step_supports_amp_scaling", False)) and all(g.get("fused") for g in inner.param_groups)


class Guard:
    """Judges each step once its gradient is there.

    The host reads the loss and the gradient's norm before the optimiser steps, which makes it wait for the
    device. `deferred`, with a fused optimiser and no scaler: the device itself skips the step, and the host learns of it one
    step later, when that is known anyway. Either way a poisoned step is never made.
    """

    def __init__(
        self,
        optimizer: Any,
        scaler: Any,
        reduce: Callable[[Tensor], Tensor],
        statistics: Iterable[Tensor] = (),
        waiting: Callable[[], None] = lambda: None,
    ) -> None:
        """statistics: buffers that a forward pass moves (BatchNorm's), and that a step which is not made must leave alone.
        waiting: called again and again while the host waits for the device; it may raise, to say why nothing will come."""
        self._optimizer = optimizer
        self._scaler = scaler
        self._waiting = waiting
        self._reduce = reduce
        """Sums a tensor over all processes, on the device."""
        self.deferred = scaler is None and skips_on_device(optimizer)
        self._pending: _Pending | None = None
        self._statistics = list(statistics)
        self._before = [tensor.clone() for tensor in self._statistics]

    def begin(self) -> None:
        """Remembers the statistics; called before a step's first forward pass."""
        if self._statistics:
            torch._foreach_copy_(self._before, self._statistics)

    def is_poisoned(self, values: dict[str, Tensor]) -> bool:
        """Whether this process's loss, or the gradient, is not finite; waits for the device.

        A finite loss with an overflown gradient is the business of fp16's scaler, if there is one: it skips the step itself
        and lowers its scale.
        """
        judged, copied = _on_its_way_to_the_host(_judged(values))
        self._wait(copied)
        total, norm = judged.tolist()
        return not (math.isfinite(total) and (math.isfinite(norm) or self._scaler is not None))

    def step(self, suspect: Suspect, control: Control) -> Outcome:
        """Makes the optimiser's step unless it is poisoned on any process. A collective."""
        if self.deferred:
            before = self._step_on_device(suspect)
            return Outcome(True, before, control.agree().stop)
        stop, poisoned = control.agree(poisoned=self.is_poisoned(suspect.values))
        if not poisoned:
            self._optimizer.step()
        elif self._statistics:
            torch._foreach_copy_(self._statistics, self._before)
        return Outcome(not poisoned, suspect if poisoned else None, stop)

    def _step_on_device(self, suspect: Suspect) -> Suspect | None:
        """The step before this one, if that was poisoned."""
        poisoned = (~torch.isfinite(_judged(suspect.values))).any().float()
        poisoned = self._reduce(poisoned).clamp(max=1)
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        inner.found_inf = poisoned
        try:
            self._optimizer.step()
        finally:
            del inner.found_inf
        _choose(self._statistics, self._before, poisoned.bool())
        before = self.settle()
        self._pending = _Pending(suspect, *_on_its_way_to_the_host(poisoned))
        return before

    def settle(self) -> Suspect | None:
        """The last step, if it was poisoned and nobody was told yet; waits for it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        self._wait(pending.copied)
        return pending.suspect if pending.flag.item() else None

    def _wait(self, copied: torch.cuda.Event | None) -> None:
        """Returns once the device is there.

        Where a peer died an all-reduce never ends, and NCCL says nothing of it: so the host asks and does not block. Waking a
        little late costs nothing, since the next step was launched before.
        """
        while copied is not None and not copied.query():
            self._waiting()
            time.sleep(POLL_SECONDS)


def _choose(tensors: list[Tensor], others: list[Tensor], others_wanted: Tensor) -> None:
    """Puts `others` into `tensors` where a bool on the device says so; a few kernels for all of one type, not some for each."""
    for dtype in {tensor.dtype for tensor in tensors}:
        kept = [(a, b) for a, b in zip(tensors, others, strict=True) if a.dtype == dtype]
        flat, flat_others = (torch.cat([tensor.flatten() for tensor in side]) for side in zip(*kept, strict=True))
        chosen = torch.where(others_wanted, flat_others, flat).split([a.numel() for a, _ in kept])
        torch._foreach_copy_([a for a, _ in kept], [c.view_as(a) for c, (a, _) in zip(chosen, kept, strict=True)])


def _on_its_way_to_the_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and what to wait for before it is read."""
    if tensor.device.type != "cuda":
        return tensor, None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copy, copied


def _judged(values: dict[str, Tensor]) -> Tensor:
    """Loss and gradient norm, [2]."""
    return torch.stack([values["loss/total"], values["gradient_norm"].to(values["loss/total"])])
