"""The loader on NVIDIA DALI, for training and evaluation: what is in flight in its pipeline, and faults.

On a GPU one graph does all. On a CPU the graph decodes and Pillow does the rest: the pixels are exactly timm's, and resizing
takes half of DALI's time. `pipeline.run()` and DALI's own iterators are not used: the iterators do not reschedule after a
failed batch, and a thin loop lets a jump keep what is in flight.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from distill.data.batch_plan import Work, gather
from distill.data.dali_graph import IN_FLIGHT, HostBatch, build_pipeline, check_sizes, dali_decodes, dali_parses, feed
from distill.data.loaders import PlannedLoader, Task
from distill.data.pixels import as_png, decode_as_indexed, png_bytes, transform_window
from distill.data.reader import BadSample, SampleReader
from distill.data.stream import Position, PositionStream
from distill.protocols import Batch

logger = logging.getLogger("distill.data")

AHEAD = 4
"""Batches read ahead of DALI."""
RECOVERIES = 8
"""Failed runs on one batch before the loader gives up; each finds all culprits that PIL finds."""
DEVICE_FAULT = re.compile(r"cuda|out of memory|bad_alloc", re.IGNORECASE)
"""DALI's words for a device or a memory that fails; a single image would then decode, or fail, whatever it is."""
NO_SAMPLE = -1
"""Stands, with a black pixel, for a batch of evaluation of which nothing is left: DALI takes no empty one."""
READERS = 4
"""Threads that read, a batch each, after the disk was told of all samples of the batch."""


class DaliStream:
    """Batches of a plan through one pipeline: `take(position)` keeps what is in flight where the position is the next one."""

    def __init__(self, task: Task, decode_only: bool) -> None:
        """decode_only: the graph decodes, and threads of the host do the rest."""
        self._task = task
        self._plan = task.plan
        self._pool = ThreadPoolExecutor(task.num_threads, thread_name_prefix="distill-pixels") if decode_only else None
        self._reader = SampleReader(task.index)
        self._host = PositionStream(self._read, task.plan.following, depth=AHEAD, workers=READERS)
        # DALI reads the encoded images where they are: a batch stays here until its outputs are there, or its pipeline is gone
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
            failure = None
            try:
                *outputs, shapes = self._pipeline.share_outputs()
                check_sizes(shapes, self._in_flight[0][1])
            except RuntimeError as error:
                failure = str(error)
            if failure is not None:  # outside of `except`: the error's frames would keep the pipeline that failed
                outputs = shapes = None
                self._recover(failure)
                continue
            _, batch = self._in_flight.popleft()
            made = self._copied(outputs) if self._pool is None else self._transformed(outputs, batch.work, self._pool)
            if batch.samples[0] == NO_SAMPLE:
                return Batch(*(each[:0] for each in made if each is not None))
            return made._replace(teacher=batch.teacher)
        raise RuntimeError(f"DALI failed {RECOVERIES} times on epoch {position.epoch}, micro-batch {position.micro}")

    def close(self) -> None:
        """Stops the threads and gives the pipeline's memory back; calling it twice is harmless."""
        self._host.close()
        self._reader.close()
        if self._pool is not None:
            self._pool.shutdown(wait=True)
        self._pipeline = None  # it ends its runs first, which read what is in flight
        self._in_flight.clear()

    def _build(self) -> None:
        task = self._task
        self._pipeline = None  # before the new one is made: two would need twice the device's memory
        self._pipeline = build_pipeline(self._plan, task.device, task.num_threads, self._pool is not None, task.decode)
        self._started = False

    def _fill(self, position: Position) -> None:
        while len(self._in_flight) < IN_FLIGHT:
            if self._in_flight:
                position = self._plan.following(self._in_flight[-1][0])
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
        while self._in_flight:
            lost = not self._started  # fed, but an error came before the first run: outputs would never come
            if not lost:
                try:
                    self._pipeline.share_outputs()
                    self._pipeline.release_outputs()
                except RuntimeError:  # a bad image in a batch that nobody asked for: it is found when somebody does
                    lost = True
            if lost:
                self._build()
                self._in_flight.clear()
            else:
                self._in_flight.popleft()

    def _recover(self, error: str) -> None:
        """After a failed run: the batch at the front without what made it fail, in a new pipeline, with all in flight again.

        A new pipeline, because what DALI promises of one that failed is only that it is invalid.
        """
        (position, batch), *others = self._in_flight
        self._build()
        self._in_flight.clear()  # before anything is raised: what is in flight is what the pipeline was fed with
        repaired = self._repaired(position, batch, error)
        for each in ((position, repaired), *others):
            self._in_flight.append(each)
            feed(self._pipeline, self._plan, each[1], self._pool is not None)
        self._start()

    def _repaired(self, position: Position, batch: HostBatch, error: str) -> HostBatch:
        bad = False
        for data, size, sample in zip(batch.encoded, batch.sizes.tolist(), batch.samples.tolist(), strict=True):
            try:
                decode_as_indexed(data.tobytes(), size)
            except BadSample as reason:
                self._task.quarantine.add(sample, str(reason), position)
                bad = True
        if bad:
            return self._read(position)
        if DEVICE_FAULT.search(error):
            raise RuntimeError(f"DALI failed, and not by an image: {error}")
        converted = dali_decodes(batch.encoded, self._task.device, self._task.decode)
        if all(converted):
            raise RuntimeError(f"DALI failed on a batch of which it decodes every image: {error}")
        for sample, fine in zip(batch.samples.tolist(), converted, strict=True):
            if not fine:
                logger.warning("sample %d (%s): DALI cannot decode it, PIL can; used PIL", sample, self._task.index.key(sample))
        encoded = [data if fine else as_png(data) for data, fine in zip(batch.encoded, converted, strict=True)]
        return replace(batch, encoded=encoded)

    def _copied(self, outputs: Any) -> Batch:
        images, labels, samples = outputs
        # clone: DALI writes its next batch into the same buffers once they are released
        pixels = torch.from_dlpack(images.as_tensor()).clone()
        ids = torch.from_numpy(np.array(samples.as_tensor()))
        target = torch.from_numpy(np.array(labels.as_tensor()))
        if self._task.device.type == "cuda":
            torch.cuda.current_stream(self._task.device).synchronize()  # the clone must be done before the release
        self._pipeline.release_outputs()
        return Batch(pixels, target.to(self._task.device), ids)

    def _transformed(self, outputs: Any, work: Work, pool: ThreadPoolExecutor) -> Batch:
        """The decoded windows, with what the host makes of them; each thread takes its share of the batch's rows."""
        windows, labels, samples = outputs
        pixels = np.empty((len(windows), *self._plan.size, 3), np.uint8)

        def transform(rows: range) -> None:
            for row in rows:
                transform_window(windows.at(row), pixels[row], work, row, self._plan)

        threads = self._task.num_threads
        shares = [range(first, len(windows), threads) for first in range(min(threads, len(windows)))]
        ids, target = (torch.from_numpy(np.array(each.as_tensor())) for each in (samples, labels))
        futures = [pool.submit(transform, rows) for rows in shares]
        wait(futures)  # also where one raised: the others read DALI's memory
        self._pipeline.release_outputs()
        for future in futures:
            future.result()  # raises what a thread raised
        return Batch(torch.from_numpy(pixels), target, ids)

    def _read(self, position: Position) -> HostBatch:
        index = self._task.index
        self._reader.reached(position)
        self._reader.announce(self._plan.samples(position))
        encoded, samples = gather(self._plan, position, self._task.quarantine, self._parsable)
        if not encoded:
            one = np.ones((1, 2), np.int64)
            black = png_bytes(Image.new("RGB", (1, 1)))
            none = np.zeros(1, np.int64)
            return HostBatch([black], one, self._plan.work(position, one, none), none, np.array([NO_SAMPLE]))
        sizes = index.sizes(samples)
        labels = index.records["label"][samples].astype(np.int64)
        work = self._plan.work(position, sizes, samples)
        return HostBatch(encoded, sizes, work, labels, samples, self._task.teacher_rows(position, samples))

    def _parsable(self, sample: int) -> NDArray[np.uint8]:
        """The sample's encoded image, as a PNG file where DALI's parser does not take it. Raises BadSample as PIL does."""
        data = self._reader.read(sample)
        *_, height, width = self._task.index.records.item(sample)  # `index.sizes` takes 14 us of each image
        if dali_parses(data, (height, width)):
            return data
        image = decode_as_indexed(data.tobytes(), (height, width))
        logger.warning("sample %d (%s): DALI cannot parse it, PIL can; used PIL", sample, self._task.index.key(sample))
        return png_bytes(image)


class DaliLoader(PlannedLoader):
    """A `Loader` through DALI, on the GPU where the task's device is one.

    `decode_only` leaves to the host what comes after decoding; None: on a CPU. The graph of a GPU runs on a CPU too, for tests.
    """

    def __init__(self, task: Task, decode_only: bool | None = None) -> None:
        if decode_only is None:
            decode_only = task.device.type == "cpu"
        self._stream = DaliStream(task, decode_only)
        # On a thread of its own, while the batch before is being used. On a CPU this is the host's part of the work; on a GPU
        # it is feeding and launching, for which the training thread would stop launching.
        self._ahead = PositionStream(self._made, task.plan.following, depth=1, workers=1)
        super().__init__(task, self._ahead.take)

    def _made(self, position: Position) -> Batch:
        """The batch, made on the loader's stream: which stream is the current one is each thread's own affair."""
        with nullcontext() if self.copying is None else torch.cuda.stream(self.copying):
            return self._stream.take(position)

    def close(self) -> None:
        """Gives files, threads and device memory back; calling it twice is harmless."""
        self._ahead.close()
        self._stream.close()
