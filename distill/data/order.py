"""The samples that each step sees: pure functions of (seed, epoch, step), independent of the number of processes.

Every random stream of the project's data path starts from `derive_seed`; the numbers come from Philox' raw 64-bit output,
whose values numpy guarantees across versions (its distributions are not guaranteed), so an order outlives an upgrade.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill.seeds import derive_seed


def permutation(seed: int, size: int) -> NDArray[np.int64]:
    """int64 [size]: a uniform permutation, by sorting random 64-bit keys."""
    keys = np.random.Philox(key=seed).random_raw(size)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def block_permutation(seed: int, size: int, block: int) -> NDArray[np.int64]:
    """int64 [size]: blocks of `block` neighbours in random order, shuffled inside a window of 8 blocks.

    For disks where random reads are slow: reads stay inside 8 neighbouring runs of samples. It mixes less than a true
    global shuffle; shards that were shuffled when prepared make up for it.
    """
    starts = permutation(derive_seed(seed, "blocks"), -(-size // block)) * block
    rows = (starts[:, None] + np.arange(block)).reshape(-1)
    rows = rows[rows < size]
    window = 8 * block
    for number, first in enumerate(range(0, size, window)):
        part = rows[first : first + window]
        rows[first : first + window] = part[permutation(derive_seed(seed, "window", number), len(part))]
    return rows


@dataclass(frozen=True)
class Lanes:
    """The choice of the third order, for nodes that hold a part of the shards only: `count` runs of shards side by side, each
    shuffled inside windows of `window` shards."""

    count: int
    window: int
    shard_samples: tuple[int, ...]
    """Samples of each shard, in the order of the index."""


class Pieces(NamedTuple):
    """Shards, or parts of shards, sorted by lane: int64 [P] each."""

    lane: NDArray[np.int64]
    first: NDArray[np.int64]
    """The first sample."""
    samples: NDArray[np.int64]
    """Number of samples; the others follow the first."""


def lane_pieces(seed: int, lanes: Lanes) -> Pieces:
    """The shards of each lane in every epoch: all shards in random order, cut into runs whose lengths differ by one sample at
    most. A border may split a shard."""
    samples = np.array(lanes.shard_samples, np.int64)
    shards = permutation(derive_seed(seed, "lanes"), len(samples))
    ends = np.cumsum(samples[shards])
    borders = _borders(int(ends[-1]), lanes.count)
    cuts = np.union1d(borders, ends)
    starts = cuts[:-1]
    places = np.searchsorted(ends, starts, side="right")
    # distance of the piece's end from the shard's, counted back from where the shard ends in the index
    first = np.cumsum(samples)[shards][places] - (ends[places] - starts)
    return Pieces(np.searchsorted(borders, starts, side="right") - 1, first, np.diff(cuts))


def lane_order(seed: int, epoch: int, lanes: Lanes, global_batch_size: int) -> NDArray[np.int64]:
    """int64 [steps * global_batch_size]: an epoch in which every global batch has equal shares of all lanes, lane by lane.

    Pieces are permuted inside their lanes, then samples inside windows of `lanes.window` pieces. The first window of lane c has
    1 + c mod W pieces, so that the lanes of a node do not come to new shards in the same step. A process's rows of a batch are
    neighbours, hence whole lanes as long as nodes x accumulate divides the number of lanes.
    """
    epoch_seed = derive_seed(seed, "order", epoch)
    lane, first, samples = lane_pieces(seed, lanes)
    shuffled = np.lexsort((np.random.Philox(key=derive_seed(epoch_seed, "pieces")).random_raw(len(lane)), lane))
    first, samples = first[shuffled], samples[shuffled]  # `lane` is sorted, and stays as it is
    starts = np.cumsum(samples) - samples
    total = int(samples.sum())
    rows = np.repeat(first - starts, samples) + np.arange(total)
    place = np.arange(len(lane)) - np.searchsorted(lane, lane)
    opens = (place == 0) | ((place - 1 - lane) % lanes.window == 0)
    keys = np.random.Philox(key=derive_seed(epoch_seed, "windows")).random_raw(total)
    for start, end in pairwise([*starts[opens].tolist(), total]):  # many small sorts take half the time of a large one
        rows[start:end] = rows[start:end][np.argsort(keys[start:end], kind="stable")]
    steps, share = total // global_batch_size, global_batch_size // lanes.count
    taken = _borders(total, lanes.count)[:-1, None] + np.arange(steps * share)
    return rows[taken].reshape(lanes.count, steps, share).swapaxes(0, 1).reshape(-1)


def _borders(total: int, lanes: int) -> NDArray[np.int64]:
    return np.arange(lanes + 1) * total // lanes


def check_lanes(lanes: int, global_batch_size: int, nodes: int = 1, accumulate: int = 1) -> None:
    """Raises ValueError, with a number of lanes that is allowed, where the lanes do not divide among the rows of a global batch
    or where the parts of a batch that a node handles at once are no whole lanes."""
    parts = nodes * accumulate
    if lanes >= 1 and global_batch_size % lanes == 0 and lanes % parts == 0:
        return
    allowed = [count for count in range(parts, global_batch_size + 1, parts) if global_batch_size % count == 0]
    nearest = min(allowed, key=lambda count: (abs(count - lanes), count), default=None)
    remedy = f"give {nearest} lanes, or change nodes or accumulate" if nearest else "give a larger global batch size"
    raise ValueError(
        f"{lanes} lanes: their number must divide the global batch size {global_batch_size} and be a multiple of "
        f"{nodes} nodes x accumulate {accumulate} = {parts}; {remedy}"
    )


def classes_per_shard(labels: NDArray[np.int64], shard_samples: Sequence[int], num_classes: int) -> tuple[float, float]:
    """Mean number of classes among the samples of a shard, as it is and as it would be if the samples were mixed.

    labels int64 [N], in the order of the shards.
    """
    samples = np.array([count for count in shard_samples if count], np.int64)
    cells = np.repeat(np.arange(len(samples)) * num_classes, samples) + labels
    counts = np.bincount(cells, minlength=len(samples) * num_classes).reshape(len(samples), num_classes)
    shares = samples[:, None] / len(labels)
    # a class of n images misses a shard with probability (1 - share)^n
    chance = 1 - (1 - shares) ** counts.sum(axis=0)
    return float((counts > 0).sum(axis=1).mean()), float(chance.sum(axis=1).mean())


IN_SHARD = 8
"""Draws of a sample in place of a bad one that stay in the bad one's shard; a shard may be bad as a whole."""


class TrainOrder:
    """The global batches of training: a new permutation per epoch, cut into whole global batches.

    The tail of each permutation that does not fill a global batch is dropped (`dropped` samples per epoch, others in every
    epoch), so that all processes have the same number of steps. `shuffle_block` is the block size of the block shuffle, 0
    asks for the global one, `lanes` for the third. Raises ValueError where there is not one global batch of samples, where
    lanes do not divide it, and for repeats in lanes.

    With `repeats` R every sample comes R times in a row, and position q of the epoch shows sample q // R of the permutation:
    repeated augmentation, as timm's RepeatAugSampler. An epoch keeps its steps and its images, so it shows 1/R of the split.
    In a global batch the first views of all its samples come first, then the second ones, and so on: as far as R processes
    or more share it, no process gets a sample twice, which is timm's reason for dealing positions out in turn.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        shuffle_block: int = 0,
        repeats: int = 1,
        lanes: Lanes | None = None,
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(f"global batch size {global_batch_size}: must be at least 1")
        if num_samples < global_batch_size:
            raise ValueError(
                f"{num_samples} samples do not fill one global batch of {global_batch_size}: lower the batch size to "
                f"{num_samples} or less"
            )
        if shuffle_block < 0:
            raise ValueError(f"shuffle_block {shuffle_block}: must be a number of samples, or 0 for a global shuffle")
        if repeats < 1:
            raise ValueError(f"repeats {repeats}: must be a number of views of each image, 1 or more")
        if lanes and repeats > 1:
            raise ValueError(f"repeats {repeats}: lanes show every image once; choose another order, or 1")
        if lanes:
            check_lanes(lanes.count, global_batch_size)
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.repeats = repeats
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.lanes = lanes
        self.steps_per_epoch = num_samples // global_batch_size
        self.dropped = num_samples % global_batch_size
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    @property
    def identity(self) -> dict[str, int | str]:
        """All that the order depends on beside the index: what a saved position in it is good for."""
        chosen: dict[str, int | str] = {"shuffle_block": self.shuffle_block}
        if self.lanes:
            chosen = {"shuffle": "lanes", "lanes": self.lanes.count, "lane_window": self.lanes.window}
        if self.repeats > 1:  # without it a state of before there were repeats is the state of the same stream
            chosen["repeats"] = self.repeats
        return {"seed": self.seed, "global_batch_size": self.global_batch_size, **chosen}

    def samples(self, epoch: int, step: int) -> NDArray[np.int64]:
        """int64 [global_batch_size]: the samples of one global batch, step counted within the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step}: an epoch has steps 0 to {self.steps_per_epoch - 1}")
        first = step * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        # stable: views of the same number stay in the order of the permutation; without repeats nothing moves
        positions = positions[np.argsort(positions % self.repeats, kind="stable")]
        return self.epoch(epoch)[positions // self.repeats].astype(np.int64)

    def view_numbers(self, step: int) -> NDArray[np.int64]:
        """int64 [global_batch_size]: the number of the view of its sample that each row of a global batch shows, from 0."""
        first = step * self.global_batch_size
        return np.sort(np.arange(first, first + self.global_batch_size) % self.repeats)

    def substitute(self, epoch: int, place: int, attempt: int) -> int:
        """A sample drawn at random for a bad one at this place of the epoch: a function of the place, so the same whoever finds
        the bad one, when. Under lanes it is one of the bad one's shard, which the node has at hand."""
        first, count = 0, self.num_samples
        if self.lanes and attempt < IN_SHARD:
            ends = np.cumsum(self.lanes.shard_samples)
            shard = int(np.searchsorted(ends, self.epoch(epoch)[place], side="right"))
            count = self.lanes.shard_samples[shard]
            first = int(ends[shard]) - count
        return first + derive_seed(self.seed, "substitute", epoch, place, attempt) % count

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, global batch after global batch; at most a part of a batch may follow the last."""
        cached = self._cached  # one read of the attribute: two threads may ask at once
        if cached is None or cached[0] != epoch:
            small = np.int32 if self.num_samples < 2**31 else np.int64  # 5 MB instead of 10 at 1.28 million
            cached = (epoch, self._permutation(epoch).astype(small))
            self._cached = cached
        return cached[1]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self.lanes:
            return lane_order(self.seed, epoch, self.lanes, self.global_batch_size)
        seed = derive_seed(self.seed, "order", epoch)
        if self.shuffle_block:
            return block_permutation(seed, self.num_samples, self.shuffle_block)
        return permutation(seed, self.num_samples)


def micro_batch_size(global_batch_size: int, accumulate: int, world_size: int) -> int:
    """Images of one micro-batch of one process.

    Raises ValueError where the global batch does not divide into `accumulate * world_size` equal parts.
    """
    parts = accumulate * world_size
    if parts < 1 or global_batch_size % parts != 0:
        raise ValueError(
            f"global batch size {global_batch_size} is not divisible by "
            f"{world_size} processes x accumulate {accumulate} = {parts}"
        )
    return global_batch_size // parts


def micro_batch_rows(global_batch_size: int, accumulate: int, rank: int, world_size: int, micro: int) -> slice:
    """The rows of a global batch that process `rank` handles as micro-batch `micro`: block `micro * world_size + rank`.

    Raises ValueError as `micro_batch_size` does.
    """
    size = micro_batch_size(global_batch_size, accumulate, world_size)
    if not (0 <= rank < world_size and 0 <= micro < accumulate):
        raise ValueError(f"rank {rank} of {world_size}, micro-batch {micro} of {accumulate}: out of range")
    first = (micro * world_size + rank) * size
    return slice(first, first + size)


def eval_samples(num_samples: int, batch_size: int, rank: int, world_size: int, batch: int) -> NDArray[np.int64]:
    """int64 [<= batch_size]: batch number `batch` of process `rank`, which takes samples rank, rank + world_size, ...

    Over all ranks and batches every sample comes exactly once; the last batch of a rank may be short, none is padded.
    """
    first = rank + batch * batch_size * world_size
    return np.arange(first, min(num_samples, first + batch_size * world_size), world_size, dtype=np.int64)


def eval_batches(num_samples: int, batch_size: int, rank: int, world_size: int) -> int:
    """Number of batches in which process `rank` sees its share once; ranks may differ by one."""
    share = len(range(rank, num_samples, world_size))
    return -(-share // batch_size)
