"""Produces the items of an endless sequence of epochs ahead of time, from any position, in background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
TURN = 0.5
"""Seconds after which a wait for an item lets Python look for signals."""


class Position(NamedTuple):
    """A micro-batch of one process: its epoch and its number within it."""

    epoch: int
    micro: int


def next_position(position: Position, per_epoch: int) -> Position:
    """The position after this one; the last of an epoch is followed by the first of the next."""
    if position.micro + 1 < per_epoch:
        return Position(position.epoch, position.micro + 1)
    return Position(position.epoch + 1, 0)


class PositionStream(Generic[Item]):
    """`take(position)` is `produce(position)`, computed ahead for the positions that `following` says come next.

    `produce` is a pure function of the position and is called from `workers` threads, up to `depth` positions ahead. A jump
    to another position throws away what was produced ahead; no other position costs anything. An exception of `produce`
    comes out of the `take` of its own position.
    """

    def __init__(
        self, produce: Callable[[Position], Item], following: Callable[[Position], Position], *, depth: int, workers: int
    ) -> None:
        self._produce = produce
        self._following = following
        self._depth = depth
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="distill-data")
        self._ahead: deque[tuple[Position, Future[Item]]] = deque()

    def take(self, position: Position) -> Item:
        """The item at this position."""
        if not self._ahead or self._ahead[0][0] != position:
            self._drop()
            self._submit(position)
        while len(self._ahead) <= self._depth:
            self._submit(self._following(self._ahead[-1][0]))
        return _result(self._ahead.popleft()[1])

    def _submit(self, position: Position) -> None:
        self._ahead.append((position, self._pool.submit(self._produce, position)))

    def _drop(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stops the threads after their present item; calling it twice is harmless."""
        self._drop()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Item]) -> Item:
    """The future's result, waited for in turns. Python handles signals in the main thread, which does not wake up for one that
    the kernel gave to another thread, or that came just before it fell asleep: a Ctrl-C would wait for a disk that hangs."""
    while not future.done():
        wait([future], TURN)
    return future.result()
