"""The two loaders in torch and PIL: the oracle for `dali.py`, and the path where DALI cannot be installed.

They share the plans (samples, windows, flips) with `dali.py`, but read the shards through the `webdataset` package, starting
at the sample's tar header, and take the images' sizes from PIL: wrong offsets or sizes in our own code come out as a
difference between the two.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from webdataset.tariterators import tar_file_iterator

from distill.data.faults import Quarantine
from distill.data.index import TAR_BLOCK, ShardIndex
from distill.data.loaders import eval_loader, stream_state, take_over, train_loader
from distill.data.pil_ops import apply_operation
from distill.data.plan import Plan, Work, gather
from distill.data.prefetch import prefetched
from distill.data.reader import BadSample, ShardLost, check_bytes
from distill.data.stream import Position, PositionStream
from distill.protocols import Batch

PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
AHEAD = 2


def read_sample(index: ShardIndex, sample: int) -> bytes:
    """The encoded image of a sample, parsed by webdataset from the tar member that starts before the indexed offset.

    Raises BadSample where the member there is not the one of the index, ShardLost where the shard cannot be read.
    """
    record = index.records[sample]
    path = index.shard_path(int(record["shard"]))
    try:
        with path.open("rb") as file:
            file.seek(int(record["offset"]) - TAR_BLOCK)
            member = next(iter(tar_file_iterator(file)))
    except (tarfile.TarError, StopIteration) as error:
        raise ShardLost(f"{path}: no tar member before offset {record['offset']}; restore the shard and resume") from error
    except OSError as error:
        raise ShardLost(f"{path}: cannot be read any more ({error.strerror}); restore the shard and resume") from error
    check_bytes(member["data"], int(record["crc32"]))
    return member["data"]


def decode(data: bytes) -> Image.Image:
    """The image as RGB; EXIF rotation is not applied, as timm does not. Raises BadSample with PIL's reason."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # its text holds a memory address
        raise BadSample(f"not an image: starts with {data[:8]!r}") from error
    except Exception as error:  # PIL raises many types for broken files
        raise BadSample(f"does not decode: {type(error).__name__}: {error}"[:200]) from error


def transform_image(image: Image.Image, work: Work, row: int, plan: Plan) -> np.ndarray:
    """uint8 [H, W, 3], (H, W) = `plan.size`: row `row` of `work`, done to the image; nothing is resized to its own size."""
    top, left, height, width = work.windows[row].tolist()
    if (height, width) != (image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    resized_h, resized_w = work.resized[row].tolist()
    if (resized_h, resized_w) != (height, width):
        image = image.resize((resized_w, resized_h), PIL_FILTERS[plan.interpolation])
    top, left = work.anchors[row].tolist()
    if (top, left, image.height, image.width) != (0, 0, *plan.size):
        image = image.crop((left, top, left + plan.size[1], top + plan.size[0]))
    if work.flips[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, argument in zip(work.operations[row].tolist(), work.arguments[row].tolist(), strict=True):
        image = apply_operation(image, operation, argument, plan.fill)
    return np.asarray(image)


class ReferenceLoader:
    """A `Loader` that follows `plan` with PIL on `num_threads` threads, a few batches ahead of their use."""

    def __init__(self, index: ShardIndex, plan: Plan, quarantine: Quarantine, device: torch.device, num_threads: int) -> None:
        index.spot_check()
        self.num_samples = index.num_samples
        self.quarantine = quarantine
        self.batches_per_epoch = plan.batches_per_epoch
        self._index = index
        self._plan = plan
        self._device = device
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="distill-decode")
        self._stream = PositionStream(self._produce, plan.batches_per_epoch, depth=AHEAD, workers=1)

    @property
    def bad_samples(self) -> list[int]:
        """Samples that this process knows to be bad, sorted."""
        return self.quarantine.samples()

    def state(self) -> dict[str, Any]:
        """All that the stream is a function of but its position, and the bad samples."""
        return stream_state(self._index, self._plan, self.quarantine)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the bad samples of a state; raises ValueError for one of another stream, and TooManyFaults."""
        take_over(state, self._index, self._plan, self.quarantine)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of this epoch from number `start` on."""
        positions = (Position(epoch, micro) for micro in range(start, self.batches_per_epoch))
        yield from prefetched(map(self._stream.take, positions), self._device)

    def close(self) -> None:
        """Stops the threads; calling it twice is harmless."""
        self._stream.close()
        self._pool.shutdown(wait=True)

    def _produce(self, position: Position) -> Batch:
        # Decoded by the pool ahead of `gather`, which asks for them one by one; only substitutes are decoded in its turn.
        ahead = {sample: self._pool.submit(self._decode, sample) for sample in self._plan.samples(position).tolist()}

        def read(sample: int) -> Image.Image:
            return ahead[sample].result() if sample in ahead else self._decode(sample)

        images, samples = gather(self._plan, position, self.quarantine, read)
        if not images:
            none = torch.zeros(0, dtype=torch.int64)
            return Batch(torch.zeros((0, *self._plan.size, 3), dtype=torch.uint8), none, none)
        work = self._plan.work(position, np.array([(image.height, image.width) for image in images], np.int64))
        rows = range(len(images))
        pixels = list(self._pool.map(lambda row: transform_image(images[row], work, row, self._plan), rows))
        labels = self._index.records["label"][samples].astype(np.int64)
        return Batch(torch.from_numpy(np.stack(pixels)), torch.from_numpy(labels), torch.from_numpy(samples))

    def _decode(self, sample: int) -> Image.Image:
        return decode(read_sample(self._index, sample))


ReferenceTrainLoader = partial(train_loader, ReferenceLoader)
ReferenceEvalLoader = partial(eval_loader, ReferenceLoader)
