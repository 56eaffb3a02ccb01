"""The visiting order: exact epochs, whatever the number of processes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import TrainPlan
from distill.data.order import TrainOrder, block_permutation, eval_batches, eval_samples, micro_batch_rows, permutation
from distill.data.stream import Position
from distill.seeds import derive_seed
from tests.distill.data.batches import global_batch


def plan(num_samples: int, batch: int, accumulate: int, rank: int, world: int, seed: int = 7, block: int = 0) -> TrainPlan:
    return TrainPlan(
        num_samples,
        size=(8, 8),
        transform=TrainTransform(),
        global_batch_size=batch,
        accumulate=accumulate,
        rank=rank,
        world_size=world,
        seed=seed,
        shuffle_block=block,
    )


BLOCKS = (0, 1, 7, 64)
"""The shuffle of the whole split, and block shuffles: what holds for one holds for the others."""


@given(
    num_samples=st.integers(1, 300),
    batch=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    block=st.sampled_from(BLOCKS),
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_holds_every_sample_at_most_once_and_drops_less_than_a_batch(num_samples, batch, seed, epoch, block):
    if num_samples < batch:
        with pytest.raises(ValueError, match=f"{num_samples} samples do not fill one global batch of {batch}"):
            TrainOrder(num_samples, batch, seed)
        return
    order = TrainOrder(num_samples, batch, seed, block)
    seen = np.concatenate([order.samples(epoch, step) for step in range(order.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen) == num_samples - order.dropped
    assert order.dropped < batch
    assert seen.min() >= 0
    assert seen.max() < num_samples


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_ranks_and_any_accumulation(world, accumulate, block):
    expected = TrainOrder(203, 48, 7, block)
    plans = [plan(203, 48, accumulate, rank, world, block=block) for rank in range(world)]
    for epoch in range(2):
        for step in range(expected.steps_per_epoch):
            assert np.array_equal(global_batch(plans, accumulate, epoch, step), expected.samples(epoch, step))
    assert {each.batches_per_epoch for each in plans} == {expected.steps_per_epoch * accumulate}


def test_augmentation_of_a_global_batch_does_not_depend_on_the_ranks():
    sizes = np.array([(40 + i, 90 - i) for i in range(24)], np.int64)
    one = plan(100, 24, 1, 0, 1).work(Position(1, 2), sizes, np.arange(24))
    windows, flips = [], []
    for micro in range(2):
        for rank in range(3):
            rows = micro_batch_rows(24, 2, rank, 3, micro)
            work = plan(100, 24, 2, rank, 3).work(Position(1, 2 * 2 + micro), sizes[rows], np.arange(len(sizes[rows])))
            windows.append(work.windows)
            flips.append(work.flips)
    assert np.array_equal(np.concatenate(windows), one.windows)
    assert np.array_equal(np.concatenate(flips), one.flips)


@given(num_samples=st.integers(0, 120), batch=st.integers(1, 17), world=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_evaluation_visits_every_sample_exactly_once_over_all_ranks(num_samples, batch, world):
    batches = [
        eval_samples(num_samples, batch, rank, world, number)
        for rank in range(world)
        for number in range(eval_batches(num_samples, batch, rank, world))
    ]
    assert all(0 < len(each) <= batch for each in batches)
    seen = np.concatenate([np.zeros(0, np.int64), *batches])
    assert np.array_equal(np.sort(seen), np.arange(num_samples))


@pytest.mark.parametrize("block", BLOCKS)
def test_epochs_and_seeds_have_orders_of_their_own(block):
    order = TrainOrder(1000, 1000, 0, block)
    assert not np.array_equal(order.samples(0, 0), order.samples(1, 0))
    assert not np.array_equal(order.samples(0, 0), TrainOrder(1000, 1000, 1, block).samples(0, 0))


def test_the_shuffle_is_global():
    """Neighbours of the index end up anywhere: the mean distance of two uniform places among n is n / 3."""
    places = np.argsort(permutation(3, 3000))
    assert abs(np.abs(np.diff(places)).mean() / 1000 - 1) < 0.05


def test_block_shuffle_visits_every_sample_once_and_reads_in_runs():
    rows = block_permutation(5, 1003, 16)
    assert np.array_equal(np.sort(rows), np.arange(1003))
    assert len(np.unique(rows[:128] // 16)) <= 9
    assert not np.array_equal(rows, np.arange(1003))


def test_batches_of_a_block_shuffle_come_from_few_places_of_the_disk():
    """16 blocks of 64 neighbours hold two windows of 512, so the samples of a step lie in at most 16 runs; those of a whole
    shuffle lie in as many as there are blocks."""
    runs = [np.unique(TrainOrder(20000, 256, 3, block).samples(0, 5) // 64).size for block in (64, 0)]
    assert runs[0] <= 16 < 100 < runs[1]


def test_a_block_size_that_is_no_number_of_samples_is_refused():
    with pytest.raises(ValueError, match="shuffle_block -1: must be a number of samples, or 0 for a global shuffle"):
        TrainOrder(100, 10, 0, -1)


def test_seeds_are_the_same_in_every_process_and_differ_by_purpose():
    """The number is that of `printf order:1:2 | b2sum -l 64`, little-endian, without its lowest bit."""
    assert derive_seed(1, "order", 2) == 8470602267951788138
    code = "from distill.data.order import derive_seed, permutation; print(derive_seed(1, 'order', 2), *permutation(9, 6))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == [str(value) for value in (derive_seed(1, "order", 2), *permutation(9, 6))]
    assert (
        len(
            {
                derive_seed(1, "order", 2),
                derive_seed(1, "augment", 2),
                derive_seed(2, "order", 1),
                derive_seed(1, "order", 2, 0),
            }
        )
        == 4
    )


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(10, 3, 1), (10, 1, 4), (16, 3, 2)])
def test_a_batch_that_does_not_divide_is_refused_with_all_numbers(batch, accumulate, world):
    message = (
        f"global batch size {batch} is not divisible by {world} processes x accumulate {accumulate} = {world * accumulate}"
    )
    with pytest.raises(ValueError, match=message):
        plan(100, batch, accumulate, 0, world)
