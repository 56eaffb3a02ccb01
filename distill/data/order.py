"""The samples that each step sees: pure functions of (seed, epoch, step), independent of the number of processes.

Every random stream of the project's data path starts from `derive_seed`; the numbers come from Philox' raw 64-bit output,
whose values numpy guarantees across versions (its distributions are not guaranteed), so an order outlives an upgrade.
"""

from __future__ import annotations

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


class TrainOrder:
    """The global batches of training: a new permutation per epoch, cut into whole global batches.

    The tail of each permutation that does not fill a global batch is dropped (`dropped` samples per epoch, others in every
    epoch), so that all processes have the same number of steps. `shuffle_block` is the block size of the block shuffle, 0
    asks for the global one. Raises ValueError where there is not one global batch of samples.

    With `repeats` R every sample comes R times in a row, and position q of the epoch shows sample q // R of the permutation:
    repeated augmentation, as timm's RepeatAugSampler. An epoch keeps its steps and its images, so it shows 1/R of the split.
    In a global batch the first views of all its samples come first, then the second ones, and so on: as far as R processes
    or more share it, no process gets a sample twice, which is timm's reason for dealing positions out in turn.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, shuffle_block: int = 0, repeats: int = 1) -> None:
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
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.repeats = repeats
        self.seed = seed
        self.shuffle_block = shuffle_block
        self.steps_per_epoch = num_samples // global_batch_size
        self.dropped = num_samples % global_batch_size
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def samples(self, epoch: int, step: int) -> NDArray[np.int64]:
        """int64 [global_batch_size]: the samples of one global batch, step counted within the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step}: an epoch has steps 0 to {self.steps_per_epoch - 1}")
        first = step * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        # stable: views of the same number stay in the order of the permutation; without repeats nothing moves
        positions = positions[np.argsort(positions % self.repeats, kind="stable")]
        return self._permutation(epoch)[positions // self.repeats].astype(np.int64)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        cached = self._cached  # one read of the attribute: two threads may ask at once
        if cached is None or cached[0] != epoch:
            seed = derive_seed(self.seed, "order", epoch)
            rows = (
                block_permutation(seed, self.num_samples, self.shuffle_block)
                if self.shuffle_block
                else permutation(seed, self.num_samples)
            )
            small = np.int32 if self.num_samples < 2**31 else np.int64  # 5 MB instead of 10 at 1.28 million
            cached = (epoch, rows.astype(small))
            self._cached = cached
        return cached[1]


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
