"""Decisions that all processes take together, between two steps: to stop when asked, to hold back a poisoned step."""

from __future__ import annotations

import signal
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

import torch
from torch import distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. Schedulers can be told to requeue on it."""


class Interrupted(RuntimeError):
    """The run was asked to stop, has saved, and can be resumed."""


class Agreed(NamedTuple):
    """What all processes agreed on."""

    stop: bool
    """Some process got a signal."""
    poisoned: bool
    """Some process found its loss or gradient not finite."""


class Control:
    """Notes SIGTERM and SIGUSR1; `agree` gives every process the same answer.

    The agreement is two integers over a gloo group of its own: it costs the hosts one message per step and never waits for
    a device. A second signal changes nothing.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        """timeout: of an agreement; None: PyTorch's, half an hour."""
        self.received = False
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: dist.ProcessGroup | None = None
        if several:
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
            # rank 0 keeps the store through which the others are still connecting: if it ended now, of a request that is
            # refused, theirs would be a connection error
            dist.barrier(self._group)

    def listen(self) -> Control:
        """Takes over the signals; only the main thread of a process may."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agree(self, poisoned: bool = False) -> Agreed:
        """What any process has to say. A collective: every process calls it at the same points."""
        return Agreed(*self._most(self.received, poisoned))

    def any(self, flag: bool) -> bool:
        """Whether any process says so. A collective, as `agree`."""
        return self._most(flag)[0]

    def _most(self, *flags: bool) -> list[bool]:
        if self._group is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in found.tolist()]
