"""The watchdog of a run: one that hangs ends with a clear error on every process that is left, which says who was missing."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

from torch import distributed as dist

PERIOD = 0.5
"""Seconds between two heartbeats."""
UNWATCHED = ("starting", "building")
"""Phases without a time limit: weights may have to come from far away."""
STORE_SECONDS = 30.0
"""The longest that a heartbeat waits for the store's answer."""
SILENT = 5.0
"""A process not heard of for this long is taken for gone when somebody asks who is missing."""
LOST = 15.0
"""A process not heard of for this long is given up while a step waits for it. Longer than SILENT, because here nothing has
failed yet: its threads may only be held up."""
GO_ON = "the last checkpoint is intact and the same command with --resume goes on"


class Beat(NamedTuple):
    """The last that a process said of itself."""

    step: int
    phase: str
    age: float
    """Seconds since its step or phase last changed."""
    number: int
    """Heartbeats so far: the same number again is an old heartbeat."""


class PeerLostError(RuntimeError):
    """A collective failed because another process is gone."""


def describe(rank: int, beat: Beat | None, silent: float) -> str:
    """A process in words: where it is, since when, and whether it fell silent."""
    if beat is None:
        return f"rank {rank}: never heard of"
    heard = f", not heard of for {silent:.0f} s" if silent > SILENT else ""
    return f"rank {rank}: step {beat.step}, {beat.phase} for {beat.age + (silent if silent > SILENT else 0):.0f} s{heard}"


def _names(gone: list[int]) -> str:
    return f"gone: rank {', '.join(map(str, gone))}"


class Watchdog:
    """Two threads beside the training: one tells the others how far this process is, one watches the clock.

    The clock's thread never touches the network, so that it ends the process even when nothing answers any more. `exit`
    is called with 1 after the message is written; training itself cannot be interrupted inside a collective.

    torch.distributed.monitored_barrier was tried in place of the heartbeats: only rank 0 learns who is missing, and where a
    loader stalls nobody is, because that process still answers. It is behind, and only its step and phase say so.
    """

    def __init__(self, rank: int, world_size: int, timeout: float, exit: Callable[[int], Any] = os._exit) -> None:
        self.rank, self.world_size, self.timeout, self._exit = rank, world_size, timeout, exit
        self._step, self._phase, self._since = 0, "starting", time.monotonic()
        self.waiting: Callable[[], str] = lambda: ""
        """What this process waits for from outside of the run, such as a shard that is fetched, and how far that is; empty
        where it waits for nothing."""
        self._waited = ""
        self._peers: dict[int, tuple[Beat, float]] = {}
        self._answered = time.monotonic()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._clock, name="watchdog", daemon=True)]
        if world_size > 1:
            self._threads.append(threading.Thread(target=self._heart, name="heartbeat", daemon=True))

    def start(self) -> Watchdog:
        """Starts the threads; the watchdog itself."""
        for thread in self._threads:
            thread.start()
        return self

    def progress(self, step: int, phase: str) -> None:
        """Notes that this process is at `step` and begins `phase`."""
        self._step, self._phase, self._since = step, phase, time.monotonic()

    def close(self) -> None:
        """Ends the watch and its threads: one that is inside the store when the interpreter ends would abort the process."""
        self._ended.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(STORE_SECONDS + PERIOD)

    def _heart(self) -> None:
        store = dist.PrefixStore("watchdog", dist.distributed_c10d._get_default_store().clone())
        store.set_timeout(timedelta(seconds=max(PERIOD, min(STORE_SECONDS, self.timeout))))
        count = 0
        while not self._ended.wait(PERIOD):
            count += 1
            mine = Beat(self._step, self._phase, time.monotonic() - self._since, count)
            try:
                store.set(str(self.rank), json.dumps(mine))
                others = [r for r in range(self.world_size) if r != self.rank and store.check([str(r)])]
                found = {r: Beat(*json.loads(store.get(str(r)))) for r in others}
            except RuntimeError:  # the store's host is gone or cut off; the clock will say since when
                continue
            self._answered = time.monotonic()
            for rank, beat in found.items():
                if rank not in self._peers or self._peers[rank][0].number != beat.number:
                    self._peers[rank] = (beat, self._answered)

    def _clock(self) -> None:
        while not self._ended.wait(min(PERIOD, self.timeout / 4)):
            if (waited := self.waiting()) != self._waited:  # what is waited for comes nearer
                self._waited, self._since = waited, time.monotonic()
            idle = min([time.monotonic() - self._since, *self._ages()])
            if idle > self.timeout and self._phase not in UNWATCHED:
                print(f"error: {self.report(idle)}", file=sys.stderr, flush=True)
                self._exit(1)
                return

    def _ages(self) -> list[float]:
        """Seconds since each other process that is heard of got on: while one fetches a shard, the others wait for it."""
        now = time.monotonic()
        return [beat.age + now - heard for beat, heard in list(self._peers.values()) if now - heard <= SILENT]

    def report(self, idle: float) -> str:
        """The message of a process without progress for `idle` seconds: where it is, who is missing, where the others are."""
        what = f" ({self._waited})" if self._waited else ""
        head = f"rank {self.rank}: step {self._step}, {self._phase}{what}: no progress for {idle:.0f} s (train.timeout_minutes)"
        if self.world_size == 1:
            return head
        silent_store = time.monotonic() - self._answered
        if silent_store > SILENT + PERIOD:
            return f"{head}; the rendezvous host has not answered for {silent_store:.0f} s: it, or the network to it, is gone"
        return "\n".join([f"{head}; {self.missing()}", *("  " + line for line in self.peers())])

    def peers(self) -> list[str]:
        """A line for every other process."""
        now = time.monotonic()
        known = {r: self._peers.get(r) for r in range(self.world_size) if r != self.rank}
        return [describe(r, k[0] if k else None, now - k[1] if k else 0.0) for r, k in known.items()]

    def _silent(self, seconds: float = SILENT) -> list[int]:
        now = time.monotonic()
        if self.world_size > 1 and now - self._answered > seconds:
            return [0]  # without the rendezvous nobody can be heard; its host is on rank 0's machine
        return [r for r, (_, heard) in list(self._peers.items()) if now - heard > seconds]

    def missing(self) -> str:
        """The processes that the others wait for: silent ones, else those that are the least far."""
        if gone := self._silent():
            return _names(gone)
        waiting = {r: beat for r, (beat, _) in self._peers.items()} | {self.rank: Beat(self._step, self._phase, 0, 0)}
        behind = [r for r, b in waiting.items() if b.phase == "waiting for data"] or [
            r for r, b in waiting.items() if b.step == min(w.step for w in waiting.values())
        ]
        return f"behind: rank {', '.join(map(str, sorted(behind)))}"

    def check(self) -> None:
        """Raises PeerLostError where a process has been silent for so long that nobody need wait for it any more."""
        if gone := self._silent(LOST):
            raise PeerLostError(f"step {self._step}, {self._phase}: {_names(gone)}; {GO_ON}")

    def explain(self, error: BaseException) -> PeerLostError | None:
        """The error to raise instead of a collective's own, once it is clear that a process fell silent; None if none did."""
        if self.world_size == 1:
            return None
        end = time.monotonic() + SILENT + 2 * PERIOD
        while time.monotonic() < end and not self._silent():
            time.sleep(PERIOD)
        if not self._silent():
            return None
        reason = " ".join(str(error).split())[:160]
        return PeerLostError(f"step {self._step}, {self._phase}: {self.missing()}; {GO_ON} ({type(error).__name__}: {reason})")
