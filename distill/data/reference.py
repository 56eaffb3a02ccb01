"""The loader in torch and PIL: the oracle for `dali.py`, and the path where DALI cannot be installed.

It shares the plans (samples, windows, flips) with `dali.py`, but reads the shards through the `webdataset` package, starting
at the sample's tar header, and decodes with PIL: wrong offsets or sizes in our own code come out as a difference between the
two.
"""

from __future__ import annotations

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from typing import IO

import numpy as np
import torch
from PIL import Image
from webdataset.tariterators import tar_file_iterator

from distill.data.batch_plan import gather
from distill.data.index import TAR_BLOCK, ShardIndex
from distill.data.loaders import PlannedLoader, Task
from distill.data.pixels import decode_as_indexed, transform_image
from distill.data.reader import BadSample, check_bytes
from distill.data.store import ShardLost
from distill.data.stream import Position, PositionStream
from distill.protocols import Batch

AHEAD = 2


def read_sample(index: ShardIndex, sample: int) -> bytes:
    """The encoded image of a sample, parsed by webdataset from the tar member that starts before the indexed offset.

    Raises BadSample where the member there is not the one of the index, ShardLost where the shard cannot be read.
    """
    shard = int(index.records[sample]["shard"])
    with os.fdopen(index.store.open(shard), "rb") as file:
        try:
            return _member(index, sample, file)
        except (BadSample, ShardLost):
            if not index.store.renewed(shard, file.fileno()):
                raise
    with os.fdopen(index.store.open(shard), "rb") as file:
        return _member(index, sample, file)


def _member(index: ShardIndex, sample: int, file: IO[bytes]) -> bytes:
    record = index.records[sample]
    where = index.store.where(int(record["shard"]))
    try:
        file.seek(int(record["offset"]) - TAR_BLOCK)
        member = next(iter(tar_file_iterator(file)))
    except (tarfile.TarError, StopIteration) as error:
        raise ShardLost(f"{where}: no tar member before offset {record['offset']}; restore the shard and resume") from error
    except OSError as error:
        raise ShardLost(f"{where}: cannot be read any more ({error.strerror}); restore the shard and resume") from error
    check_bytes(member["data"], int(record["crc32"]))
    return member["data"]


class ReferenceLoader(PlannedLoader):
    """A `Loader` with PIL on the task's threads, a few batches ahead of their use."""

    def __init__(self, task: Task) -> None:
        self._pool = ThreadPoolExecutor(task.num_threads, thread_name_prefix="distill-decode")
        self._stream = PositionStream(self._produce, task.plan.following, depth=AHEAD, workers=1)
        super().__init__(task, self._stream.take)

    def close(self) -> None:
        """Stops the threads; calling it twice is harmless."""
        self._stream.close()
        self._pool.shutdown(wait=True)

    def _produce(self, position: Position) -> Batch:
        self.task.index.store.reached(position)
        # Decoded by the pool ahead of `gather`, which asks for them one by one; only substitutes are decoded in its turn.
        wanted = set(self.task.plan.samples(position).tolist())  # once each, however many views of it the batch has
        ahead = {sample: self._pool.submit(self._decode, sample) for sample in wanted}

        def read(sample: int) -> Image.Image:
            return ahead[sample].result() if sample in ahead else self._decode(sample)

        images, samples = gather(self.task.plan, position, self.quarantine, read)
        if not images:
            none = torch.zeros(0, dtype=torch.int64)
            return Batch(torch.zeros((0, *self.task.plan.size, 3), dtype=torch.uint8), none, none)
        work = self.task.plan.work(position, self.task.index.sizes(samples), samples)
        rows = range(len(images))
        pixels = list(self._pool.map(lambda row: transform_image(images[row], work, row, self.task.plan), rows))
        labels = self.task.index.records["label"][samples].astype(np.int64)
        teacher = self.task.teacher_rows(position, samples)
        return Batch(torch.from_numpy(np.stack(pixels)), torch.from_numpy(labels), torch.from_numpy(samples), teacher)

    def _decode(self, sample: int) -> Image.Image:
        index = self.task.index
        return decode_as_indexed(read_sample(index, sample), index.sizes(sample).tolist())
