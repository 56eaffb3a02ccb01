"""Repeated augmentation: timm's rule for which samples, on any number of ranks, and views of their own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import TrainPlan
from distill.data.order import TrainOrder
from distill.data.stream import Position
from tests.distill.data.test_loaders import KINDS, same, train


def plan(batch: int, accumulate: int, rank: int, world: int, repeats: int) -> TrainPlan:
    numbers = {"global_batch_size": batch, "accumulate": accumulate, "rank": rank, "world_size": world, "seed": 7}
    return TrainPlan(1024, size=(8, 8), transform=TrainTransform(), repeats=repeats, **numbers)


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
@pytest.mark.parametrize("world", [1, 4, 8])
def test_every_global_batch_has_the_samples_that_timms_sampler_gives_all_ranks(world, repeats):
    """timm's sampler in the order of the index, which our permutation is laid over; 1024 is a multiple of its rounding, 256."""
    order = TrainOrder(1024, 64, 7, repeats=repeats)
    place = np.argsort(np.concatenate([TrainOrder(1024, 64, 7).samples(0, step) for step in range(16)]))
    ranks = [list(RepeatAugSampler(range(1024), world, rank, shuffle=False, num_repeats=repeats)) for rank in range(world)]
    assert {len(each) for each in ranks} == {1024 // world}, "an epoch keeps its number of images"
    assert order.steps_per_epoch == 1024 // 64
    for step in range(order.steps_per_epoch):
        share = slice(step * 64 // world, (step + 1) * 64 // world)
        assert Counter(place[order.samples(0, step)].tolist()) == Counter(sample for each in ranks for sample in each[share])


def test_an_epoch_shows_a_share_of_the_split_and_each_image_the_same_number_of_times():
    order = TrainOrder(1024, 64, 7, repeats=4)
    seen = [Counter(np.concatenate([order.samples(e, s) for s in range(16)]).tolist()) for e in range(2)]
    assert all(len(each) == 1024 // 4 and set(each.values()) == {4} for each in seen)
    assert set(seen[0]) != set(seen[1])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_with_repeats_global_batches_are_the_same_for_any_number_of_ranks(world, accumulate):
    expected = TrainOrder(1024, 48, 7, repeats=3)
    plans = [plan(48, accumulate, rank, world, 3) for rank in range(world)]
    for step in (0, 1, expected.steps_per_epoch - 1):
        positions = [Position(1, step * accumulate + micro) for micro in range(accumulate)]
        parts = [each.samples(position) for position in positions for each in plans]
        assert np.array_equal(np.concatenate(parts), expected.samples(1, step))


@given(repeats=st.integers(1, 4), more=st.integers(0, 4), share=st.integers(1, 12), step=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_as_many_processes_as_views_see_no_image_twice_in_a_step(repeats, more, share, step):
    """As timm's, whose ranks take positions in turn."""
    world = repeats + more
    for rank in range(world):
        samples = plan(world * share, 1, rank, world, repeats).samples(Position(0, step))
        assert len(set(samples.tolist())) == share


def test_each_view_has_numbers_of_its_own():
    one = plan(48, 1, 0, 1, 3)
    work = one.work(Position(0, 0), np.full((48, 2), 500, np.int64), one.samples(Position(0, 0)))
    for sample in set(one.samples(Position(0, 0)).tolist()):
        rows = np.flatnonzero(one.samples(Position(0, 0)) == sample)
        assert len(np.unique(work.windows[rows], axis=0)) == len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_views_resume_bit_for_bit_from_the_middle_of_an_epoch(kind, make_split):
    index = make_split()
    whole = train(kind, index, accumulate=2, repeats=3)
    batches = list(whole.epoch(1))
    resumed = train(kind, index, accumulate=2, repeats=3)
    resumed.restore(whole.state())
    assert same(list(resumed.epoch(1, 5)), batches[5:])
    plain = train(kind, index, accumulate=2)
    with pytest.raises(ValueError, match="the saved state is of another stream"):
        resumed.restore(plain.state())
    for loader in (whole, resumed, plain):
        loader.close()


def test_no_number_of_views_is_refused():
    with pytest.raises(ValueError, match="repeats 0: must be a number of views of each image, 1 or more"):
        TrainOrder(100, 10, 0, repeats=0)
