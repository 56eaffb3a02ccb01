"""Decisions that all processes take together, between two steps: to stop when asked, to hold back a poisoned step."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

import torch
from torch import distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Requests to save and stop: of a scheduler, of Ctrl-C, of a terminal that is closed."""
TWICE_SECONDS = 1.0
"""A second Ctrl-C counts from then on: torchrun passes the terminal's first one on to processes that have it already."""


class Agreed(NamedTuple):
    """What all processes agreed on."""

    stop: bool
    """Some process got a signal."""
    poisoned: bool
    """Some process found its loss or gradient not finite."""


class Control:
    """Notes `SIGNALS`; `agree` gives every process the same answer.

    The agreement is two integers over a gloo group of its own: it costs the hosts one message per step and never waits for
    a device. A second signal changes nothing, but a second Ctrl-C ends the process at once.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        """timeout: of an agreement; None: PyTorch's, half an hour."""
        self.received = False
        self._interrupted: float | None = None
        """When Ctrl-C came first, on the clock that never jumps."""
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
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # nohup: it outlives its terminal
                continue
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number != signal.SIGINT:
            return
        if self._interrupted is None:
            self._interrupted = time.monotonic()
            # no print: the signal may have come in the middle of one
            os.write(2, b"\nCtrl-C: saving, then stopping; again: ending at once, without saving\n")
        elif time.monotonic() - self._interrupted >= TWICE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

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
