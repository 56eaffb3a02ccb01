"""A node's shards over time: what the cache fetches ahead, what it evicts, and how much room that takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from distill.data.order import TrainOrder, eval_batches, eval_samples
from distill.data.stream import Position
from distill.data.visits import Visits, bytes_held, node_visits

SLACK = 8
"""Steps for which a shard is kept after its last use: processes of a node read up to as many apart (4 batches are read ahead, 2
are in DALI, 1 is on the way to the device, 1 is trained on). Too small a number would cost a second download, nothing else."""
NEVER = np.iinfo(np.int64).max


class ShardSchedule:
    """The visits of a node's processes to its shards, epoch after epoch."""

    def __init__(
        self, visits: Callable[[int], Visits], shard_bytes: Sequence[int], steps_per_epoch: int, accumulate: int = 1
    ) -> None:
        """visits: those of an epoch, by its number; a pure function. accumulate: micro-batches of a step."""
        self._visits = visits
        self._bytes = shard_bytes
        self._steps = steps_per_epoch
        self._accumulate = accumulate
        self._known: dict[int, Visits] = {}

    def of_epoch(self, epoch: int) -> Visits:
        """The visits of an epoch; two epochs are kept, for each takes some 0.1 s to find."""
        found = self._known.get(epoch)
        if found is None:
            found = self._visits(epoch)
            self._known = {known: kept for known, kept in self._known.items() if abs(known - epoch) == 1} | {epoch: found}
        return found

    def next_use(self, position: Position) -> NDArray[np.int64]:
        """int64, per shard: steps until it is needed, 0 for one that is, `NEVER` where two epochs do without it."""
        step = position.epoch * self._steps + position.micro // self._accumulate
        use = np.full(len(self._bytes), NEVER)
        for epoch in (position.epoch, position.epoch + 1):
            shard, first, last = self.of_epoch(epoch)
            ahead = last + SLACK >= step
            np.minimum.at(use, shard[ahead], np.maximum(first[ahead] - step, 0))
        return use

    def upcoming(self, position: Position) -> list[int]:
        """The shards that are needed from a position on, to the end of the next epoch, in the order of their need."""
        use = self.next_use(position)
        return [shard for shard in np.argsort(use, kind="stable").tolist() if use[shard] != NEVER]

    def idle(self, position: Position) -> list[int]:
        """The shards that are not needed just now."""
        return np.flatnonzero(self.next_use(position)).tolist()

    def epoch_bytes(self, epoch: int = 0) -> int:
        """Bytes of the shards that an epoch needs."""
        return sum(self._bytes[shard] for shard in np.unique(self.of_epoch(epoch).shard).tolist())

    def least_bytes(self, epoch: int = 0) -> int:
        """The room in which no shard is evicted while it is needed: the most that is needed at once, and one shard that is
        fetched ahead; no more than all shards."""
        both = [np.concatenate(parts) for parts in zip(self.of_epoch(epoch), self.of_epoch(epoch + 1), strict=True)]
        visits = Visits(both[0], both[1], both[2] + SLACK)
        everything = sum(self._bytes[shard] for shard in np.unique(visits.shard).tolist())
        return min(everything, bytes_held(visits, self._bytes, ahead=0) + max(self._bytes, default=0))


def train_schedule(
    order: TrainOrder,
    shard_samples: Sequence[int],
    shard_bytes: Sequence[int],
    *,
    node: int,
    nodes: int,
    accumulate: int,
) -> ShardSchedule:
    """The schedule of training at node number `node` of `nodes`. Raises ValueError as `node_visits` does."""

    def visits(epoch: int) -> Visits:
        return node_visits(order, shard_samples, epoch, node=node, nodes=nodes, accumulate=accumulate)

    return ShardSchedule(visits, shard_bytes, order.steps_per_epoch, accumulate)


def eval_schedule(
    shard_samples: Sequence[int], shard_bytes: Sequence[int], *, batch_size: int, node: range, world_size: int
) -> ShardSchedule:
    """The schedule of evaluation on the processes `node` of `world_size`; a step is a batch of each, and all epochs are the
    same."""
    ends, count = np.cumsum(shard_samples), sum(shard_samples)
    steps = max((eval_batches(count, batch_size, rank, world_size) for rank in node), default=0)
    first, last = (np.full(len(shard_samples), -1) for _ in range(2))
    for step in range(steps):
        samples = np.concatenate([eval_samples(count, batch_size, rank, world_size, step) for rank in node])
        shards = np.unique(np.searchsorted(ends, samples, side="right"))
        last[shards] = step
        first[shards] = np.where(first[shards] < 0, step, first[shards])
    shard = np.flatnonzero(first >= 0)  # in order: samples are evaluated in the order of the index

    def visits(epoch: int) -> Visits:
        return Visits(shard, first[shard] + epoch * steps, last[shard] + epoch * steps)

    return ShardSchedule(visits, shard_bytes, steps)
