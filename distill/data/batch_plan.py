"""What a micro-batch consists of, on the host: which samples, and what is to be done with each image.

Both loaders follow these plans; a plan holds no position, it answers for any.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill.data.augment.parameters import (
    TrainTransform,
    covering_sizes,
    crop_windows,
    eval_geometry,
    flips,
    layers,
    uniforms,
    view_uniforms,
)
from distill.data.augment.policy import NONE
from distill.data.faults import Quarantine
from distill.data.order import Lanes, TrainOrder, eval_batches, eval_samples, micro_batch_rows, micro_batch_size
from distill.data.reader import BadSample
from distill.data.stream import Position, next_position
from distill.protocols import InputSpec, Interpolation

Loaded = TypeVar("Loaded")
SLICED = ("pad", "simple_random")
"""Crops that cut the view out of a padded image."""


@dataclass(frozen=True)
class Work:
    """The work on each of B images, done in the order of these fields; evaluation and all kinds of training are cases of it."""

    windows: NDArray[np.int64]
    """[B, 4] (top, left, height, width): the part of the stored image to decode, inside it."""
    resized: NDArray[np.int64]
    """[B, 2] (height, width): the size to resize that part to."""
    anchors: NDArray[np.int64]
    """[B, 2] (top, left): where the output is cut out of it; black where it reaches outside, and outside of what the plan
    mirrors around it."""
    flips: NDArray[np.int32]
    """[B]: 1 where the output is flipped left to right."""
    operations: NDArray[np.int32]
    """[B, L]: L layers of operations of `policy.py` after the flip, by number."""
    arguments: NDArray[np.float32]
    """[B, L]: what each of them is done with."""


@dataclass(frozen=True)
class Views:
    """A fixed number of views of every sample, with which epochs take turns; their numbers come from (seed, view, sample)."""

    count: int
    seed: int = 0
    """Apart from the run's seed: runs of several seeds may share what was computed of the views."""


class Plan(Protocol):
    """Answers for any position which samples it has and what is done with them."""

    identity: Mapping[str, int | str]
    """All that the order of samples depends on, beside index and position."""
    size: tuple[int, int]
    """(height, width) of the output."""
    interpolation: Interpolation
    num_layers: int
    """Layers of operations after the flip."""
    fill: tuple[int, int, int]
    """Colour that comes in from outside in them."""
    resizes: bool
    """False where no image is ever resized: `resized` is then the size of the window."""
    slices: bool
    """False where the resized image is the output: all `anchors` are then 0."""
    mirrored: int
    """Pixels mirrored around the resized image before the output is cut out of it."""
    exact: bool
    """False where images are resized and flipped and no more: another resizer than Pillow may then do both at once."""
    batch_size: int
    """The largest batch."""
    batches_per_epoch: int

    def following(self, position: Position) -> Position:
        """The position that is wanted after this one, for what is made ahead."""
        ...

    def samples(self, position: Position) -> NDArray[np.int64]:
        """int64 [B]: the samples of the batch."""
        ...

    def substitute(self, position: Position, row: int, attempt: int) -> int | None:
        """The sample that takes the place of a bad one in this row; None where the row is left out instead."""
        ...

    def view(self, position: Position) -> int:
        """The number of the view that the batch shows; 0 where views are not counted."""
        ...

    def plain(self, position: Position) -> NDArray[np.bool_] | None:
        """bool [B]: the rows that are cut and flipped only; None where all rows are made alike."""
        ...

    def work(self, position: Position, sizes: NDArray[np.int64], samples: NDArray[np.int64]) -> Work:
        """What to do with each image, from the images' `sizes` [B, 2] as (height, width) and of which `samples` [B]."""
        ...


class TrainingViews:
    """What is the same of all views that a training transform gives, whichever samples they are of."""

    def __init__(self, transform: TrainTransform, size: tuple[int, int]) -> None:
        """size: (height, width) of the views. ValueError where they have not as many pixels as are to be mirrored."""
        if transform.mirrored >= min(size):
            raise ValueError(
                f"padding {transform.mirrored}: must be less than the side of the views, {min(size)}, to be mirrored"
            )
        self.transform = transform
        self.size = size
        self.interpolation = transform.interpolation
        self.num_layers = transform.num_layers
        self.fill = transform.fill
        self.resizes = transform.crop != "pad"
        self.slices = transform.crop in SLICED
        self.mirrored = transform.mirrored
        self.exact = self.slices or self.num_layers > 0

    def plain(self, position: Position) -> NDArray[np.bool_] | None:
        """None: all rows are made alike."""
        return None

    def drawn(self, sizes: NDArray[np.int64], numbers: NDArray[np.float64]) -> Work:
        """What is done with images of these `sizes` [B, 2] by the random `numbers` of each."""
        flipped = flips(self.transform, numbers)
        drawn = layers(self.transform, self.size, numbers)
        if self.slices:
            resized = covering_sizes(sizes, self.size) if self.resizes else sizes
            windows = crop_windows(self.transform, resized, self.size, numbers)
            return Work(whole_windows(sizes), resized, windows[:, :2], flipped, *drawn)
        windows = crop_windows(self.transform, sizes, self.size, numbers)
        resized = np.broadcast_to(np.array(self.size, np.int64), sizes.shape)
        return Work(windows, resized, np.zeros_like(sizes), flipped, *drawn)


class TrainPlan(TrainingViews):
    """The micro-batches of process `rank` in training: pure functions of (seed, epoch, micro-batch)."""

    def __init__(
        self,
        num_samples: int,
        *,
        size: tuple[int, int],
        transform: TrainTransform,
        global_batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_block: int = 0,
        repeats: int = 1,
        plain_repeats: int = 0,
        lanes: Lanes | None = None,
        views: Views | None = None,
    ) -> None:
        """plain_repeats: so many of each image's `repeats` are cut and flipped only. views: None draws anew in every epoch, by
        the place in the epoch."""
        super().__init__(transform, size)
        rows = [micro_batch_rows(global_batch_size, accumulate, rank, world_size, micro) for micro in range(accumulate)]
        self.order = TrainOrder(num_samples, global_batch_size, seed, shuffle_block, repeats, lanes)
        self.identity: Mapping[str, int | str] = self.order.identity
        if views is not None:
            if repeats > 1:
                raise ValueError(f"repeats {repeats} with {views.count} views: a batch would repeat one view; give one of them")
            self.identity = {**self.identity, "views": views.count, "view_seed": views.seed}
        if plain_repeats:  # without it a state of before there were plain ones is the state of the same stream
            self.identity = {**self.identity, "plain_repeats": plain_repeats}
        self.plain_repeats = plain_repeats
        self.views = views
        self.batch_size = micro_batch_size(global_batch_size, accumulate, world_size)
        self.batches_per_epoch = self.order.steps_per_epoch * accumulate
        self._rows = rows

    def following(self, position: Position) -> Position:
        """The next micro-batch; the first of the next epoch after the last."""
        return next_position(position, self.batches_per_epoch)

    def samples(self, position: Position) -> NDArray[np.int64]:
        """int64 [B]: the samples of this micro-batch."""
        step, micro = divmod(position.micro, len(self._rows))
        return self.order.samples(position.epoch, step)[self._rows[micro]]

    def first_row(self, position: Position) -> int:
        """The place in the epoch of the micro-batch's first image; its other images follow."""
        step, micro = divmod(position.micro, len(self._rows))
        return step * self.order.global_batch_size + self._rows[micro].start

    def substitute(self, position: Position, row: int, attempt: int) -> int:
        """A sample drawn at random: a function of the row's place in the epoch, so the same whoever finds the bad one, when."""
        return self.order.substitute(position.epoch, self.first_row(position) + row, attempt)

    def view(self, position: Position) -> int:
        """The epochs' numbers modulo the number of views."""
        return position.epoch % self.views.count if self.views is not None else 0

    def plain(self, position: Position) -> NDArray[np.bool_] | None:
        """bool [B]: the rows that are among the first views of their images; None where no views are to be plain."""
        if not self.plain_repeats:
            return None
        step, micro = divmod(position.micro, len(self._rows))
        return self.order.view_numbers(step)[self._rows[micro]] < self.plain_repeats

    def work(self, position: Position, sizes: NDArray[np.int64], samples: NDArray[np.int64]) -> Work:
        """What to do with each image, from the images' `sizes` [B, 2] as (height, width) and of which `samples` [B]."""
        if self.views is None:
            numbers = uniforms(self.order.seed, position.epoch, self.first_row(position), len(sizes))
        else:  # by sample, so that a substitute too is shown in one of its own views
            numbers = view_uniforms(self.views.seed, self.view(position), samples)
        work, plain = self.drawn(sizes, numbers), self.plain(position)
        if plain is not None:
            work.operations[plain] = NONE
        return work


class EntryPlan(TrainingViews):
    """Training views of samples that are named: batch number `micro` is `entries[micro]`, a view's number and its samples.

    A bad sample is left out, as in evaluation: what is computed of an entry must be of that entry.
    """

    def __init__(
        self,
        entries: Sequence[tuple[int, NDArray[np.int64]]],
        *,
        batch_size: int,
        size: tuple[int, int],
        transform: TrainTransform,
        seed: int,
    ) -> None:
        """batch_size: of the largest entry; `entries` may be computed as they are asked for."""
        super().__init__(transform, size)
        self.identity: Mapping[str, int | str] = {}
        self.entries, self.seed = entries, seed
        self.batch_size = batch_size
        self.batches_per_epoch = len(entries)

    def following(self, position: Position) -> Position:
        """The next batch, and after the last the first again."""
        return Position(position.epoch, (position.micro + 1) % self.batches_per_epoch)

    def samples(self, position: Position) -> NDArray[np.int64]:
        """int64 [B]: the samples of this batch."""
        return self.entries[position.micro][1]

    def view(self, position: Position) -> int:
        """The view of this batch."""
        return self.entries[position.micro][0]

    def substitute(self, position: Position, row: int, attempt: int) -> None:
        """None: a bad sample's entry has no other."""
        return None

    def work(self, position: Position, sizes: NDArray[np.int64], samples: NDArray[np.int64]) -> Work:
        """What to do with each image, from the images' `sizes` [B, 2] as (height, width) and of which `samples` [B]."""
        return self.drawn(sizes, view_uniforms(self.seed, self.view(position), samples))


class EvalPlan:
    """The batches of process `rank` in evaluation: every sample of the split once over all ranks, in order."""

    def __init__(self, num_samples: int, *, spec: InputSpec, batch_size: int, rank: int, world_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size}: must be at least 1")
        self.identity: Mapping[str, int | str] = {}
        self.num_samples = num_samples
        self.spec = spec
        self.size = (spec.height, spec.width)
        self.interpolation = spec.interpolation
        self.num_layers = 0
        self.fill = (0, 0, 0)
        self.resizes = True
        self.slices = True
        self.mirrored = 0
        self.exact = True
        self.batch_size = batch_size
        self.batches_per_epoch = eval_batches(num_samples, batch_size, rank, world_size)
        self._rank = rank
        self._world_size = world_size

    def following(self, position: Position) -> Position:
        """The next batch, and after the last the first again: every evaluation is of the same epoch, and what is made ahead at
        the end of one is what the next begins with."""
        return Position(position.epoch, (position.micro + 1) % self.batches_per_epoch)

    def samples(self, position: Position) -> NDArray[np.int64]:
        """int64 [<= B]: the samples of this batch."""
        return eval_samples(self.num_samples, self.batch_size, self._rank, self._world_size, position.micro)

    def substitute(self, position: Position, row: int, attempt: int) -> None:
        """None: a stand-in would be counted twice, so the bad sample is left out, and the batch is shorter."""
        return None

    def view(self, position: Position) -> int:
        """0: evaluation has no views."""
        return 0

    def plain(self, position: Position) -> None:
        """None: all images are treated alike."""
        return None

    def work(self, position: Position, sizes: NDArray[np.int64], samples: NDArray[np.int64]) -> Work:
        """What to do with each image, from the images' `sizes` [B, 2] as (height, width); whichever sample it is."""
        resized, anchors = eval_geometry(sizes, self.spec)
        none = np.zeros((len(sizes), 0), np.int32), np.zeros((len(sizes), 0), np.float32)
        return Work(whole_windows(sizes), resized, anchors, np.zeros(len(sizes), np.int32), *none)


def whole_windows(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [B, 4]: the windows that are the whole images."""
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def gather(
    plan: Plan, position: Position, quarantine: Quarantine, read: Callable[[int], Loaded]
) -> tuple[list[Loaded], NDArray[np.int64]]:
    """The samples of the batch as `read` gives them, and their rows in the index, after bad ones were replaced.

    `read` raises BadSample for a bad sample, which is then quarantined and replaced (in training) or left out (in
    evaluation, where nothing may be left). Raises TooManyFaults.
    """
    loaded: list[Loaded] = []
    samples: list[int] = []
    for row, planned in enumerate(plan.samples(position).tolist()):
        sample: int | None = planned
        for attempt in itertools.count():
            if sample is None:
                break
            if sample in quarantine:
                quarantine.check()  # where every sample is bad, a search for a good one would not end
            else:
                try:
                    loaded.append(read(sample))
                except BadSample as error:
                    quarantine.add(sample, str(error), position)
                else:
                    samples.append(sample)
                    break
            sample = plan.substitute(position, row, attempt)
    return loaded, np.array(samples, np.int64)
