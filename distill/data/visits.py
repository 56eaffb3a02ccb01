"""Which shards a node needs in training, in which order and for how long: what a cache of remote shards fetches and keeps by.

Everything here is a pure function of the order; it knows neither files nor stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.data.order import TrainOrder, micro_batch_rows


class Visits(NamedTuple):
    """The stays of shards at one node, int64 [V] each, in the order in which they begin; steps are counted over the whole run.

    Shards that begin in the same step are sorted by where they end. A shard that a border of lanes splits comes once for each
    of its lanes that the node has.
    """

    shard: NDArray[np.int64]
    first: NDArray[np.int64]
    """The first step that reads the shard."""
    last: NDArray[np.int64]
    """The last step that reads it."""


def node_visits(
    order: TrainOrder, shard_samples: Sequence[int], epoch: int, *, node: int, nodes: int, accumulate: int
) -> Visits:
    """The visits of one epoch at node number `node` of `nodes`, whose processes have neighbouring ranks.

    shard_samples: samples of each shard, in the order of the index. Takes some 0.1 s for 1.28 million samples beside making the
    order. Raises ValueError where the global batch does not divide into nodes x accumulate.
    """
    size, steps = order.global_batch_size, order.steps_per_epoch
    parts = [micro_batch_rows(size, accumulate, node, nodes, micro) for micro in range(accumulate)]
    columns = np.concatenate([np.arange(part.start, part.stop) for part in parts])
    samples = np.stack([order.samples(epoch, step)[columns] for step in range(steps)])
    shards = np.searchsorted(np.cumsum(shard_samples), samples, side="right")
    lanes = columns // (size // order.lanes.count) if order.lanes else np.zeros_like(columns)
    stays = (lanes * len(shard_samples) + shards).reshape(-1)
    read = np.repeat(np.arange(steps), len(columns))
    first, last = np.full((2, int(stays.max()) + 1), -1)
    last[stays] = read  # of several values for one place the last one stays
    first[stays[::-1]] = read[::-1]
    found = np.flatnonzero(first >= 0)
    found = found[np.lexsort((last[found], first[found]))]
    begun = epoch * steps
    return Visits(found % len(shard_samples), first[found] + begun, last[found] + begun)


def bytes_held(visits: Visits, shard_bytes: Sequence[int], ahead: int = 1) -> int:
    """The most bytes that are held at once, where every shard is there `ahead` steps before its first use and is dropped after
    its last. With 1, the least, the shards of the next step are fetched during the present one.

    visits: of one epoch, or of several epochs one after the other.
    """
    change: dict[int, int] = {}
    for shard, first, last in _stays(visits, ahead):
        change[first] = change.get(first, 0) + shard_bytes[shard]
        change[last + 1] = change.get(last + 1, 0) - shard_bytes[shard]
    return max(np.cumsum([change[step] for step in sorted(change)]).tolist(), default=0)


def _stays(visits: Visits, ahead: int) -> Iterator[tuple[int, int, int]]:
    """(shard, first, last) of each stay that begins `ahead` steps early; of stays that touch only one is left."""
    ends: dict[int, tuple[int, int]] = {}
    for shard, first, last in zip(*(part.tolist() for part in visits), strict=True):
        begin = first - ahead
        if shard in ends and begin <= ends[shard][1] + 1:
            begin, last = ends[shard][0], max(last, ends[shard][1])
        elif shard in ends:
            yield shard, *ends[shard]
        ends[shard] = begin, last
    for shard, stay in ends.items():
        yield shard, *stay
