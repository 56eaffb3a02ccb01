"""A fixed number of views: an image's pixels are a function of (view seed, view, sample), whatever shows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import EntryPlan, Views
from distill.data.faults import Quarantine
from distill.data.loaders import Task
from distill.protocols import Batch, Loader
from tests.distill.data.conftest import picture
from tests.distill.data.planting import BAD, encoded, raw_split
from tests.distill.data.test_loaders import CPU, KINDS, train

CROPS = {"rand_augment": "rand-m9-mstd0.5-inc1"}


def shown(batches: list[Batch]) -> dict[int, torch.Tensor]:
    """Pixels by sample."""
    return {i: image for batch in batches for i, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)}


def with_views(kind, index, count: int = 2, seed: int = 5, **options) -> Loader:
    return train(kind, index, faults={"views": Views(count, seed), "max_bad_rate": 1.0}, **CROPS, **options)


def entries_loader(kind, index, entries, seed: int = 5) -> Loader:
    plan = EntryPlan(entries, batch_size=33, size=(40, 40), transform=TrainTransform(**CROPS), seed=seed)
    return kind(Task(index, plan, Quarantine(index, 1.0), CPU, 2))


def assert_same_pixels(one: dict[int, torch.Tensor], other: dict[int, torch.Tensor]) -> None:
    both = one.keys() & other.keys()
    assert len(both) > 20
    assert all(torch.equal(one[i], other[i]) for i in both)


@pytest.mark.parametrize("kind", KINDS)
def test_epochs_take_turns_with_the_views_in_an_order_of_their_own(kind, make_split):
    index = make_split()
    loader = with_views(kind, index)
    epochs = [list(loader.epoch(epoch)) for epoch in range(3)]
    loader.close()
    assert [batch.sample_ids.tolist() for batch in epochs[0]] != [batch.sample_ids.tolist() for batch in epochs[2]]
    assert_same_pixels(shown(epochs[0]), shown(epochs[2]))
    first, second = shown(epochs[0]), shown(epochs[1])
    assert not any(torch.equal(first[i], second[i]) for i in first.keys() & second.keys())


@pytest.mark.parametrize("kind", KINDS)
def test_named_entries_are_the_views_that_training_shows(kind, make_split):
    index = make_split()
    loader = with_views(kind, index, batch=24)
    wanted = shown(list(loader.epoch(1)))
    loader.close()
    samples = np.arange(index.num_samples)
    entries = entries_loader(kind, index, [(1, samples[:20]), (0, samples[:5]), (1, samples[20:])])
    found = list(entries.epoch(0))
    entries.close()
    assert [batch.sample_ids.tolist() for batch in found] == [[*range(20)], [*range(5)], [*range(20, index.num_samples)]]
    assert_same_pixels(shown([found[0], found[2]]), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_substitute_is_shown_in_one_of_its_own_views_and_a_bad_entry_is_left_out(kind, tmp_path):
    images = [encoded(picture(50, 60, seed=n), quality=90) for n in range(48)]
    spoiled = images.copy()
    spoiled[7] = BAD["half"](images[7])
    good = raw_split(tmp_path / "good", images)
    bad = raw_split(tmp_path / "bad", spoiled)
    one, other = with_views(kind, good), with_views(kind, bad)
    as_it_was, with_substitute = (list(loader.epoch(0)) for loader in (one, other))
    [gone] = other.bad_samples
    for loader in (one, other):
        loader.close()
    ids = [np.concatenate([batch.sample_ids.numpy() for batch in epoch]) for epoch in (as_it_was, with_substitute)]
    [place] = np.flatnonzero(ids[0] != ids[1])
    substitute = with_substitute[place // 12].images[place % 12]
    assert torch.equal(substitute, shown(as_it_was)[int(ids[1][place])])
    entries = entries_loader(kind, bad, [(0, np.arange(gone - 2, gone + 2))])
    [batch] = entries.epoch(0)
    entries.close()
    assert batch.sample_ids.tolist() == [gone - 2, gone - 1, gone + 1]


@pytest.mark.parametrize("count", [0, 3])
def test_a_state_of_other_views_is_refused_with_both(count, make_split):
    index = make_split()
    kind = KINDS[-1].values[0]
    saved = with_views(kind, index)
    here = with_views(kind, index, count) if count else train(kind, index, **CROPS)
    with pytest.raises(ValueError, match=f"views 2 there, {count or 'not set'} here"):
        here.restore(saved.state())
    for loader in (saved, here):
        loader.close()
