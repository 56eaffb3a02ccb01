"""The two loaders on NVIDIA DALI, training and evaluation. The only file that imports it.

On a GPU one graph does all. On a CPU the graph decodes and Pillow does the rest: the pixels are exactly timm's, and resizing
takes half of DALI's time. The graph has no random state and no reader: bytes, windows and flips come in from the plan
(`plan.py`), so a position of the stream can be produced at any time. `pipeline.run()` and DALI's own iterators are not used:
the iterators do not reschedule after a failed batch, and a thin loop lets a jump keep what is in flight.
"""

from __future__ import annotations

import importlib.util
import io
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distill.data.borders import borders
from distill.data.dali_ops import add_layer, resize, resize_with_borders
from distill.data.faults import Quarantine
from distill.data.header import image_size
from distill.data.index import ShardIndex
from distill.data.loaders import eval_loader, stream_state, take_over, train_loader
from distill.data.plan import Plan, Work, gather
from distill.data.policy import affine_matrices
from distill.data.prefetch import prefetched
from distill.data.reader import BadSample, SampleReader
from distill.data.reference import decode, transform_image
from distill.data.stream import Position, PositionStream, next_position
from distill.protocols import Batch

logger = logging.getLogger("distill.data")

IN_FLIGHT = 2
"""Batches inside DALI; its `prefetch_queue_depth`."""
AHEAD = 4
"""Batches read ahead of DALI."""
RECOVERIES = 8
"""Failed runs on one batch before the loader gives up; each finds all culprits that PIL finds."""
NO_SAMPLE = -1
"""Stands, with a black pixel, for a batch of evaluation of which nothing is left: DALI takes no empty one."""
READERS = 4
"""Threads that read, a batch each, after the disk was told of all samples of the batch."""


def dali_available() -> bool:
    """Whether DALI is installed here; nothing else in the project needs it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no `nvidia` namespace at all
        return False


@dataclass(frozen=True)
class HostBatch:
    """A batch as DALI is fed with it: encoded images, what to do with each, labels and samples int64 [B]."""

    encoded: list[NDArray[np.uint8]]
    work: Work
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]


def build_pipeline(plan: Plan, device: torch.device, num_threads: int, decode_only: bool) -> Any:
    """The DALI pipeline: decode a window, and unless `decode_only` resize, slice (black outside), flip, layers -> uint8 HWC
    each, labels, samples.

    On a GPU the decoder is `mixed` with the CPU's chroma upsampling, on the CPU all is CPU. EXIF rotation is not applied.
    """
    from nvidia.dali import fn, math, pipeline_def, types

    modules = SimpleNamespace(fn=fn, math=math, types=types)
    decoder = "mixed" if device.type == "cuda" else "cpu"

    def source(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    def transformed(images: Any) -> Any:
        if plan.resizes:
            size = source("resized", types.FLOAT, 1) if plan.slices else plan.size
            if plan.shows_borders:
                images = resize_with_borders(modules, images, size, plan.interpolation, source)
            else:
                images = resize(modules, images, size, plan.interpolation)
        if plan.slices:
            anchor = source("anchor", types.INT32, 1)
            images = fn.slice(images, start=anchor, shape=plan.size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
        if plan.shows_borders:
            images = fn.cast(images / source("shares", types.FLOAT, 3), dtype=types.UINT8)
        images = fn.flip(images, horizontal=source("flip", types.INT32, 0))
        for layer in range(plan.num_layers):
            operation = source(f"operation{layer}", types.INT32, 0)
            argument = source(f"argument{layer}", types.FLOAT, 0)
            images = add_layer(modules, images, operation, argument, source(f"matrix{layer}", types.FLOAT, 2), plan.fill)
        return images

    @pipeline_def(enable_conditionals=plan.num_layers > 0)
    def graph() -> Any:
        images = fn.decoders.image_slice(
            source("encoded", types.UINT8, 1),
            start=source("window_start", types.INT32, 1),
            shape=source("window_shape", types.INT32, 1),
            axes=(0, 1),
            device=decoder,
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        if not decode_only:
            images = transformed(images)
        return images, source("labels", types.INT64, 0), source("samples", types.INT64, 0)

    pipeline = graph(
        batch_size=plan.batch_size, num_threads=num_threads, device_id=gpu_number(device), prefetch_queue_depth=IN_FLIGHT
    )
    pipeline.build()
    return pipeline


def feed(pipeline: Any, plan: Plan, batch: HostBatch, decode_only: bool) -> None:
    """Hands one batch to every input that the graph of `plan` has."""
    work = batch.work
    pipeline.feed_input("labels", batch.labels)
    pipeline.feed_input("samples", batch.samples)
    pipeline.feed_input("encoded", batch.encoded)
    pipeline.feed_input("window_start", work.windows[:, :2].astype(np.int32))
    pipeline.feed_input("window_shape", work.windows[:, 2:].astype(np.int32))
    if decode_only:
        return
    if plan.resizes and plan.slices:
        pipeline.feed_input("resized", work.resized.astype(np.float32))
    if plan.slices:
        pipeline.feed_input("anchor", work.anchors.astype(np.int32))
    if plan.shows_borders:
        feed_borders(pipeline, plan, work)
    pipeline.feed_input("flip", work.flips)
    for layer in range(plan.num_layers):
        operations, arguments = work.operations[:, layer], work.arguments[:, layer]
        pipeline.feed_input(f"operation{layer}", np.ascontiguousarray(operations))
        pipeline.feed_input(f"argument{layer}", np.ascontiguousarray(arguments))
        matrices = affine_matrices(operations, arguments, plan.size)
        pipeline.feed_input(f"matrix{layer}", matrices.astype(np.float32))


def feed_borders(pipeline: Any, plan: Plan, work: Work) -> None:
    """The inputs of `resize_with_borders`, and what its output is divided by."""
    sources = work.windows[:, 2:]
    found = borders(sources, work.resized, work.anchors, plan.size, plan.interpolation)
    pipeline.feed_input("padded_start", (-found.margins).astype(np.int32))
    pipeline.feed_input("padded_shape", (sources + 2 * found.margins).astype(np.int32))
    pipeline.feed_input("image_start", found.margins.astype(np.float32))
    pipeline.feed_input("image_end", (found.margins + sources).astype(np.float32))
    pipeline.feed_input("shares", found.shares)


class DaliStream:
    """Batches of a plan through one pipeline: `take(position)` keeps what is in flight where the position is the next one."""

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        quarantine: Quarantine,
        device: torch.device,
        num_threads: int,
        decode_only: bool,
    ) -> None:
        self._index = index
        self._plan = plan
        self._quarantine = quarantine
        self._device = device
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="distill-pixels") if decode_only else None
        self._reader = SampleReader(index)
        self._host = PositionStream(self._read, plan.batches_per_epoch, depth=AHEAD, workers=READERS)
        self._in_flight: deque[tuple[Position, HostBatch]] = deque()
        self._pipeline: Any = None
        self._started = False
        self._build()

    def take(self, position: Position) -> Batch:
        """The batch at this position. Raises TooManyFaults, ShardLost, and RuntimeError where DALI fails without a culprit."""
        if self._in_flight and self._in_flight[0][0] != position:
            self._drain()
        self._fill(position)
        for _ in range(RECOVERIES):
            try:
                outputs = self._pipeline.share_outputs()
            except RuntimeError as error:
                self._recover(str(error))
                continue
            _, batch = self._in_flight.popleft()
            made = self._copied(outputs) if self._pool is None else self._transformed(outputs, batch.work, self._pool)
            return made if batch.samples[0] != NO_SAMPLE else Batch(*(each[:0] for each in made))
        raise RuntimeError(f"DALI failed {RECOVERIES} times on epoch {position.epoch}, micro-batch {position.micro}")

    def close(self) -> None:
        """Stops the threads and gives the pipeline's memory back; calling it twice is harmless."""
        self._host.close()
        self._reader.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._in_flight.clear()
        self._pipeline = None

    def _build(self) -> None:
        self._pipeline = build_pipeline(self._plan, self._device, self._num_threads, self._pool is not None)
        self._started = False

    def _fill(self, position: Position) -> None:
        while len(self._in_flight) < IN_FLIGHT:
            if self._in_flight:
                position = next_position(self._in_flight[-1][0], self._plan.batches_per_epoch)
            batch = self._host.take(position)
            self._in_flight.append((position, batch))
            feed(self._pipeline, self._plan, batch, self._pool is not None)
            if self._started:
                self._pipeline.schedule_run()
        self._start()

    def _start(self) -> None:
        """DALI's first schedule_run starts as many runs as its queue is deep, so all of them must have been fed before."""
        if not self._started:
            self._pipeline.schedule_run()
            self._started = True

    def _drain(self) -> None:
        if not self._started:  # fed, but an error came before the first run: outputs would never come
            self._in_flight.clear()
            self._build()
        while self._in_flight:
            self._in_flight.popleft()
            try:
                self._pipeline.share_outputs()
            except RuntimeError:  # a bad image in a batch that nobody asked for: it is found when somebody does
                self._in_flight.clear()
                self._build()
            else:
                self._pipeline.release_outputs()

    def _recover(self, error: str) -> None:
        """After a failed run: the batch at the front without what made it fail, in a new pipeline, with all in flight again.

        A new pipeline, because what DALI promises of one that failed is only that it is invalid.
        """
        (position, batch), *others = self._in_flight
        self._in_flight.clear()  # before anything is raised: what is in flight is what the pipeline was fed with
        self._build()
        repaired = self._repaired(position, batch, error)
        for each in ((position, repaired), *others):
            self._in_flight.append(each)
            feed(self._pipeline, self._plan, each[1], self._pool is not None)
        self._start()

    def _repaired(self, position: Position, batch: HostBatch, error: str) -> HostBatch:
        bad = False
        for data, sample in zip(batch.encoded, batch.samples.tolist(), strict=True):
            try:
                decode(data.tobytes())
            except BadSample as reason:
                self._quarantine.add(sample, str(reason), position)
                bad = True
        if bad:
            return self._read(position)
        converted = [self._dali_decodes(data) for data in batch.encoded]
        if all(converted):
            raise RuntimeError(f"DALI failed on a batch of which it decodes every image: {error}")
        for sample, fine in zip(batch.samples.tolist(), converted, strict=True):
            if not fine:
                logger.warning("sample %d (%s): DALI cannot decode it, PIL can; used PIL", sample, self._index.key(sample))
        encoded = [data if fine else as_png(data) for data, fine in zip(batch.encoded, converted, strict=True)]
        return replace(batch, encoded=encoded)

    def _dali_decodes(self, data: NDArray[np.uint8]) -> bool:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=gpu_number(self._device), prefetch_queue_depth=1)
        with pipeline:
            source = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pipeline.set_outputs(fn.decoders.image(source, device="mixed" if on_gpu else "cpu", adjust_orientation=False))
        pipeline.build()
        pipeline.feed_input("encoded", [data])
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True

    def _copied(self, outputs: Any) -> Batch:
        images, labels, samples = outputs
        # clone: DALI writes its next batch into the same buffers once they are released
        pixels = torch.from_dlpack(images.as_tensor()).clone()
        ids = torch.from_numpy(np.array(samples.as_tensor()))
        target = torch.from_numpy(np.array(labels.as_tensor()))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the clone must be done before the release
        self._pipeline.release_outputs()
        return Batch(pixels, target.to(self._device), ids)

    def _transformed(self, outputs: Any, work: Work, pool: ThreadPoolExecutor) -> Batch:
        """The decoded windows, with what Pillow makes of them; each thread takes its share of the batch's rows."""
        windows, labels, samples = outputs
        pixels = np.empty((len(windows), *self._plan.size, 3), np.uint8)

        def transform(rows: range) -> None:
            for row in rows:
                if self._plan.exact:
                    pixels[row] = transform_image(Image.fromarray(windows.at(row)), work, row, self._plan)
                else:
                    resize_and_flip(windows.at(row), pixels[row], bool(work.flips[row]), self._plan.interpolation)

        shares = [range(first, len(windows), self._num_threads) for first in range(min(self._num_threads, len(windows)))]
        ids, target = (torch.from_numpy(np.array(each.as_tensor())) for each in (samples, labels))
        futures = [pool.submit(transform, rows) for rows in shares]
        wait(futures)  # also where one raised: the others read DALI's memory
        self._pipeline.release_outputs()
        for future in futures:
            future.result()  # raises what a thread raised
        return Batch(torch.from_numpy(pixels), target, ids)

    def _read(self, position: Position) -> HostBatch:
        def read(sample: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
            data = self._reader.read(sample)
            try:
                return data, image_size(data.data)
            except ValueError as error:
                raise BadSample(str(error)) from error

        self._reader.announce(self._plan.samples(position))
        loaded, samples = gather(self._plan, position, self._quarantine, read)
        if not loaded:
            work = self._plan.work(position, np.ones((1, 2), np.int64))
            return HostBatch([png_bytes(Image.new("RGB", (1, 1)))], work, np.zeros(1, np.int64), np.array([NO_SAMPLE]))
        work = self._plan.work(position, np.array([size for _, size in loaded], np.int64))
        labels = self._index.records["label"][samples].astype(np.int64)
        return HostBatch([data for data, _ in loaded], work, labels, samples)


def as_png(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image that PIL decodes and DALI does not (GIF, AVIF), in a format that both do; the pixels are the same."""
    return png_bytes(decode(data.tobytes()))


def png_bytes(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [size]: the image as a PNG file."""
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return np.frombuffer(encoded.getvalue(), np.uint8)


def resize_and_flip(image: NDArray[np.uint8], out: NDArray[np.uint8], flip: bool, interpolation: str) -> None:
    """uint8 [H, W, 3] into `out`, uint8 of another height and width, by torch's version of Pillow's filters.

    A third of Pillow's time; one value in 300 is another level, by at most 2. An image of the size of `out` is not changed.
    """
    if image.shape != out.shape:
        resized = np.empty_like(out) if flip else out
        # what `interpolate` calls, which has no `out` and would hand back planes: turned into pixels at half of the cost again
        resize = getattr(torch.ops.aten, f"_upsample_{interpolation}2d_aa").out
        source, target = (torch.from_numpy(each).permute(2, 0, 1)[None] for each in (image, resized))
        resize(source, out.shape[:2], False, None, None, out=target)
        image = resized
    # by NumPy: torch would start a team of threads in each of ours
    if flip:
        out.view("V3")[:] = image.view("V3")[:, ::-1]  # whole pixels: byte by byte takes three times as long
    elif image is not out:
        out[:] = image


def gpu_number(device: torch.device) -> int | None:
    """DALI's `device_id`: None is its CPU backend."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()


class DaliLoader:
    """A `Loader` that follows `plan` through DALI, on the GPU where `device` is one.

    `decode_only` leaves to Pillow what comes after decoding; None: on a CPU. The graph of a GPU runs on a CPU too, for tests.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: Plan,
        quarantine: Quarantine,
        device: torch.device,
        num_threads: int,
        decode_only: bool | None = None,
    ) -> None:
        if decode_only is None:
            decode_only = device.type == "cpu"
        index.spot_check()
        self.num_samples = index.num_samples
        self.batches_per_epoch = plan.batches_per_epoch
        self.quarantine = quarantine
        self._index = index
        self._plan = plan
        self._device = device
        self._stream = DaliStream(index, plan, quarantine, device, num_threads, decode_only)
        # Pillow's part, too, is done while the batch before is being used
        self._ahead = PositionStream(self._stream.take, plan.batches_per_epoch, depth=1, workers=1) if decode_only else None

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
        take = self._stream.take if self._ahead is None else self._ahead.take
        positions = (Position(epoch, micro) for micro in range(start, self.batches_per_epoch))
        yield from prefetched(map(take, positions), self._device)

    def close(self) -> None:
        """Gives files, threads and device memory back; calling it twice is harmless."""
        if self._ahead is not None:
            self._ahead.close()
        self._stream.close()


DaliTrainLoader = partial(train_loader, DaliLoader)
DaliEvalLoader = partial(eval_loader, DaliLoader)
