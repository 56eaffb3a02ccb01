"""Plain views beside altered ones: which rows they are, their pixels, and that all else stays what it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import TrainPlan
from distill.data.stream import Position
from tests.distill.data.conftest import picture
from tests.distill.data.planting import BAD, encoded, raw_split
from tests.distill.data.test_loaders import KINDS, same, train

VIEWS = {"repeats": 3, "plain_repeats": 1, "crop": "pad"}
ALTERED = {"rand_augment": "rand-m9-n3-p1"}


def plan(world: int, rank: int, accumulate: int = 1, **options) -> TrainPlan:
    numbers = {"global_batch_size": 48, "accumulate": accumulate, "rank": rank, "world_size": world, "seed": 7}
    return TrainPlan(1000, size=(8, 8), transform=TrainTransform(**ALTERED), **numbers, **options)


@pytest.mark.parametrize(("repeats", "plain"), [(2, 1), (3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 2), (2, 1), (4, 3)])
def test_so_many_views_of_each_image_are_plain_on_any_number_of_ranks(world, accumulate, repeats, plain):
    plans = [plan(world, rank, accumulate, repeats=repeats, plain_repeats=plain) for rank in range(world)]
    seen: dict[int, list[bool]] = {}
    for micro in range(plans[0].batches_per_epoch):
        for each in plans:
            position = Position(1, micro)
            for sample, is_plain in zip(each.samples(position).tolist(), each.plain(position).tolist(), strict=True):
                seen.setdefault(sample, []).append(is_plain)
    whole = [views for views in seen.values() if len(views) == repeats]
    assert len(whole) >= len(seen) - 1, "of the image at the epoch's end views may be missing"
    assert {sum(views) for views in whole} == {plain}


def test_two_micro_batches_of_two_views_are_the_plain_ones_and_the_others():
    first, second = (plan(1, 0, 2, repeats=2, plain_repeats=1).plain(Position(0, micro)) for micro in (0, 1))
    assert first.all()
    assert not second.any()


def test_nothing_is_done_to_plain_rows_but_cut_and_flip_and_all_others_are_as_without_them():
    altered, mixed = (plan(1, 0, repeats=3, plain_repeats=count) for count in (0, 1))
    position, sizes = Position(2, 1), np.full((48, 2), 40, np.int64)
    one, other = (each.work(position, sizes, each.samples(position)) for each in (altered, mixed))
    rows = mixed.plain(position)
    assert altered.plain(position) is None
    assert (one.operations != 0).all()
    assert (other.operations[rows] == 0).all()
    assert np.array_equal(one.operations[~rows], other.operations[~rows])
    for name in ("windows", "resized", "anchors", "flips", "arguments"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_of_plain_rows_are_those_of_a_run_that_alters_nothing_bit_for_bit(kind, make_split):
    index = make_split()
    mixed, nothing, everything = (
        train(kind, index, **{**VIEWS, **options}) for options in (ALTERED, {}, {**ALTERED, "plain_repeats": 0})
    )
    for batch, unaltered, altered in zip(*(loader.epoch(1) for loader in (mixed, nothing, everything)), strict=True):
        assert batch.plain.dtype == torch.bool
        assert batch.plain.sum() == 4
        assert altered.plain is None
        assert torch.equal(batch.images[batch.plain], unaltered.images[batch.plain])
        assert torch.equal(batch.images[~batch.plain], altered.images[~batch.plain])
        assert not torch.equal(batch.images[~batch.plain], unaltered.images[~batch.plain])
    for loader in (mixed, nothing, everything):
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_with_plain_views_resumes_bit_for_bit_and_is_no_other_stream(kind, make_split):
    index = make_split()
    whole, resumed, older = (train(kind, index, **{**VIEWS, "plain_repeats": count}) for count in (1, 1, 0))
    batches = list(whole.epoch(1))
    resumed.restore(whole.state())
    following = list(resumed.epoch(1, 2))
    assert same(following, batches[2:])
    assert all(torch.equal(one.plain, other.plain) for one, other in zip(following, batches[2:], strict=True))
    assert "plain_repeats" not in older.state(), "a state of before there were plain views is the state of the same stream"
    with pytest.raises(ValueError, match="plain_repeats 1 there, not set here"):
        older.restore(whole.state())
    for loader in (whole, resumed, older):
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_substitute_of_a_bad_sample_is_plain_where_the_sample_was_to_be(kind, tmp_path):
    images = [encoded(picture(50, 60, seed=number), quality=90) for number in range(24)]
    splits = [raw_split(tmp_path / "good", images), raw_split(tmp_path / "bad", [BAD["half"](images[0]), *images[1:]])]
    loaders = [train(kind, index, **VIEWS, **ALTERED, faults={"max_bad_rate": 0.1}) for index in splits]
    good, bad = (list(loader.epoch(0)) + list(loader.epoch(1)) + list(loader.epoch(2)) for loader in loaders)
    for loader in loaders:
        loader.close()
    replaced = [one.sample_ids != other.sample_ids for one, other in zip(good, bad, strict=True)]
    assert sum(int(rows.sum()) for rows in replaced) >= 3
    assert all(torch.equal(one.plain, other.plain) for one, other in zip(good, bad, strict=True))
