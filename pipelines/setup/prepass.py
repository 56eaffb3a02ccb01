"""A pre-pass, which makes a teacher cache: what is asked, the objects that compute and write it, the claim of its folder."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from distill.batch_transform import to_pixels
from distill.errors import RequestError
from distill.files import locked
from distill.protocols import Batch
from distill.recipe import Recipe
from distill.seeds import derive_seed, seed_all
from distill.teacher_cache.codecs import CodecName, FeatureType, absent_row
from distill.teacher_cache.files import CacheError, view_path
from distill.teacher_cache.teacher import Recorder, asked_regions, codec_facts
from distill.teacher_cache.writer import Entries, Unit, Writer
from pipelines.setup.data import Splits, build_entry_loader, build_splits, data_facts, train_images
from pipelines.setup.machine import of_main_process
from pipelines.setup.models import Models, build_models
from pipelines.setup.teacher_cache import cache_facts, check_cacheable, live_teacher, regions_fact

SAMPLE = 4
"""Batches that are computed to say how long it will take; the first of several does not count."""


class Asked(NamedTuple):
    """The command line: whose outputs, where, how many views and in what form."""

    recipe: Recipe
    out: Path
    views: int
    codec: CodecName
    dtype: FeatureType
    k: int
    batch: int
    unit: int


class Speed(NamedTuple):
    """What some entries took on this process: seconds in all, seconds of the teacher in them, and their number."""

    whole: float
    alone: float
    images: int


class PrePass:
    """The objects of one pre-pass: the whole teacher, the loader's settings and the folder that is written."""

    def __init__(self, asked: Asked, accelerator: Accelerator) -> None:
        recipe = asked.recipe
        self.asked, self.accelerator = asked, accelerator
        self.splits: Splits = build_splits(recipe, accelerator)
        data = data_facts(recipe, self.splits.train, 1)  # any number of processes will do: no batch of a training is made
        seed_all(derive_seed(recipe.seed, "initialisation"))  # as a run does: a random teacher is then the same one
        self.models: Models = build_models(recipe, self.splits.train.num_classes, data, accelerator.device)
        teacher = live_teacher(self.models)
        check_cacheable(recipe, self.models, asked.codec, self.splits.train.num_samples)
        facts: dict[str, Any] = cache_facts(recipe, self.models, self.splits, accelerator)
        with accelerator.autocast():
            facts["codec"] = codec_facts(asked.codec, teacher, asked.dtype, asked.k)
        facts |= {"regions": regions_fact(teacher.backbone), "unit": asked.unit, "batch": asked.batch}
        self.writer = Writer(asked.out, facts)
        self.recorder = Recorder(teacher, self.writer.codec, asked_regions(teacher.backbone.needs))

    def batches(self, entries: Sequence[Any]) -> Iterator[Batch]:
        """The entries' batches, on the device."""
        asked = self.asked
        images = train_images(asked.recipe, self.models)
        loader = build_entry_loader(asked.recipe, self.splits, images, entries, asked.batch, self.accelerator)
        try:
            yield from loader.epoch(0)
        finally:
            loader.close()

    def record(self, batch: Batch, wanted: NDArray[np.int64]) -> tuple[NDArray[np.void], list[int]]:
        """The rows of the samples `wanted`, and those of them that could not be read."""
        rows = np.repeat(absent_row(self.writer.codec), len(wanted))
        found = batch.sample_ids.cpu().numpy()
        if len(found):
            with self.accelerator.autocast():
                pixels = to_pixels(batch.images, self.asked.recipe.train.channels_last)
                try:
                    rows[np.searchsorted(wanted, found)] = self.recorder.record(pixels, batch.labels)
                except ValueError as error:
                    raise CacheError(f"{self.asked.out}: {error}") from None
        return rows, np.setdiff1d(wanted, found).tolist()

    def fill(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Computes and writes units, one after the other; each is given back once it is on the disk."""
        batches = self.batches(entries := Entries(units, self.asked.batch))
        place = 0
        for unit in units:
            crc32, absent = 0, []
            for _ in range(unit.first, unit.last, self.asked.batch):
                wanted = entries[place][1]
                rows, missing = self.record(next(batches), wanted)
                self.writer.write(unit, int(wanted[0]), rows)
                crc32 = zlib.crc32(rows.tobytes(), crc32)
                absent += missing
                place += 1
            self.writer.mark(unit, crc32, absent)
            yield unit
        batches.close()  # type: ignore[attr-defined]

    def measure(self) -> Speed:
        """How long a few batches take. Every process measures."""
        n, batch = self.splits.train.num_samples, self.asked.batch
        starts = range(0, min(n, SAMPLE * batch), batch)
        entries = [(0, np.arange(first, min(n, first + batch))) for first in starts]
        whole, alone, images, begin = 0.0, 0.0, 0, time.perf_counter()
        for number, each in enumerate(self.batches(entries)):
            start = time.perf_counter()
            self.record(each, entries[number][1])
            end = time.perf_counter()
            if number or len(entries) == 1:
                whole, alone, images = whole + end - begin, alone + end - start, images + len(each.labels)
            begin = end
        return Speed(whole, alone, images)


@contextmanager
def claimed(work: PrePass) -> Iterator[int]:
    """Makes this launch the only one that writes to the folder, for as long as the context is open; gives the cache's number of
    views. Raises RequestError on every process where that cannot be, CacheError where the disk is too small."""
    lock: IO[str] | None = None

    def begin() -> int:
        """The cache's number of views, once its folder is this launch's."""
        nonlocal lock
        try:
            lock = _locked(work.asked.out)
            return work.writer.begin(work.asked.views)
        except ValueError as error:
            raise RequestError(f"--out: {error}") from None
        except OSError as error:
            out, why = work.asked.out, error.strerror or error
            raise RequestError(f"--out {out}: cannot be a cache's folder: {why}; give one that can be written") from None

    views = of_main_process(work.accelerator, begin)
    with lock or nullcontext():
        yield views


def finish(work: PrePass, hashed: Sequence[tuple[str, list[Unit]]]) -> None:
    """Says that the cache is whole. CacheError where rows are not what was written: they are then missing again."""
    if damaged := [unit for _, units in hashed for unit in units]:
        work.writer.forget(damaged)
        names = ", ".join(sorted({view_path(work.asked.out, unit.view).name for unit in damaged}))
        raise CacheError(
            f"{work.asked.out}: rows of {names} changed since they were written; the same command makes them again"
            f" ({len(damaged)} units)"
        )
    work.writer.finish(len(hashed), [sha256 for sha256, _ in hashed])


def _locked(folder: Path) -> IO[str]:
    try:
        return locked(folder)
    except BlockingIOError:
        raise RequestError(f"another process is writing to {folder}; wait for it, or give another folder") from None
