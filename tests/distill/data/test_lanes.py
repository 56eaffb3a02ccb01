"""Lanes: an epoch that is the same for any number of nodes, and of which each node reads its own part of the shards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import TrainPlan, gather
from distill.data.faults import Quarantine
from distill.data.loaders import train_task
from distill.data.order import Lanes, TrainOrder, check_lanes, classes_per_shard, lane_order, lane_pieces
from distill.data.reader import BadSample
from distill.data.reference import ReferenceLoader
from distill.data.stream import Position
from distill.data.visits import Visits, bytes_held, node_visits
from tests.distill.data.batches import global_batch

SHARDS = (31, 7, 0, 40, 12, 25, 33, 18, 9, 28, 36, 5)
"""Samples of shards of very different sizes, one of them empty: 244 together."""
SHARD_OF = np.repeat(np.arange(len(SHARDS)), SHARDS)
BATCH = 24


def order(lanes: int = 8, window: int = 2, seed: int = 3, batch: int = BATCH) -> TrainOrder:
    return TrainOrder(sum(SHARDS), batch, seed, lanes=Lanes(lanes, window, SHARDS))


def plan(rank: int, world: int, accumulate: int) -> TrainPlan:
    parts = {"global_batch_size": BATCH, "accumulate": accumulate, "rank": rank, "world_size": world, "seed": 3}
    return TrainPlan(sum(SHARDS), size=(8, 8), transform=TrainTransform(), lanes=Lanes(8, 2, SHARDS), **parts)


@given(
    shards=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 9),
    share=st.integers(1, 5),
    window=st.integers(1, 5),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_has_every_sample_at_most_once_and_equal_shares_of_all_lanes(shards, lanes, share, window, seed):
    total, batch = sum(shards), lanes * share
    if total < batch:
        return
    chosen = Lanes(lanes, window, tuple(shards))
    steps = lane_order(seed, 2, chosen, batch).reshape(-1, lanes, share)
    assert len(steps) == total // batch, "no fewer steps than the other orders have"
    assert len(np.unique(steps)) == steps.size
    pieces = lane_pieces(seed, chosen)
    for lane in range(lanes):
        own = [np.arange(first, first + n) for at, first, n in zip(*pieces, strict=True) if at == lane]
        assert np.isin(steps[:, lane], np.concatenate(own)).all()
        assert abs(sum(map(len, own)) - total / lanes) < 1


def test_the_remainder_is_another_one_in_every_epoch():
    made = order()
    assert made.dropped > 0
    left = [frozenset(range(sum(SHARDS))) - frozenset(made.epoch(epoch).tolist()) for epoch in range(20)]
    assert {len(each) for each in left} == {made.dropped}
    assert len(set(left)) == 20
    assert not frozenset.intersection(*left)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_are_the_same_for_any_number_of_nodes_and_any_accumulation(world, accumulate):
    expected, plans = order(), [plan(rank, world, accumulate) for rank in range(world)]
    for epoch in range(2):
        for step in range(expected.steps_per_epoch):
            assert np.array_equal(global_batch(plans, accumulate, epoch, step), expected.samples(epoch, step))


def test_a_lane_reads_one_window_of_shards_at_a_time_and_its_first_window_depends_on_its_number():
    """16 shards of 30 samples in 4 lanes: no border splits a shard, so windows can be counted."""
    lanes = Lanes(4, 3, (30,) * 16)
    for epoch in range(3):
        steps = lane_order(5, epoch, lanes, 8).reshape(-1, 4, 2).swapaxes(0, 1).reshape(4, 120) // 30
        for lane, shards in enumerate(steps):
            sizes = [1, 3] if lane % 3 == 0 else [2, 2] if lane % 3 == 1 else [3, 1]
            windows = np.split(shards, [30 * sizes[0]])
            assert [len(set(window.tolist())) for window in windows] == sizes
            assert sizes[0] == 1 or len(np.unique(windows[0][:20])) > 1, "samples of a window are mixed"


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_node_reads_the_shards_of_its_lanes_only_and_the_same_in_every_epoch(nodes):
    """Neighbouring nodes share a shard where a border of their lanes splits one."""
    made = order(lanes=4)
    epochs = [
        [set(node_visits(made, SHARDS, epoch, node=node, nodes=nodes, accumulate=1).shard.tolist()) for node in range(nodes)]
        for epoch in range(8)
    ]
    own = [set.union(*(epoch[node] for epoch in epochs)) for node in range(nodes)]
    assert set.union(*own) == {shard for shard, samples in enumerate(SHARDS) if samples}
    assert sum(map(len, own)) <= 11 + nodes - 1
    pieces = lane_pieces(3, Lanes(4, 2, SHARDS))
    for node in range(nodes):
        of_node = pieces.first[pieces.lane // (4 // nodes) == node]
        assert own[node] <= set(SHARD_OF[of_node].tolist())


def brute_force(made: TrainOrder, epoch: int, node: int, nodes: int, accumulate: int) -> dict[tuple[int, int], list[int]]:
    """(lane, shard) -> the steps in which the node reads it, sample by sample."""
    found: dict[tuple[int, int], list[int]] = {}
    size, part = made.global_batch_size, made.global_batch_size // (nodes * accumulate)
    for step in range(made.steps_per_epoch):
        for row, sample in enumerate(made.samples(epoch, step).tolist()):
            lane = row // (size // made.lanes.count) if made.lanes else 0
            if row // part % nodes == node:
                found.setdefault((lane, int(SHARD_OF[sample])), []).append(epoch * made.steps_per_epoch + step)
    return found


@pytest.mark.parametrize(("nodes", "accumulate"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize(
    "made",
    [order(), order(4, 1), TrainOrder(244, BATCH, 3), TrainOrder(244, BATCH, 3, 16)],
    ids=["lanes", "narrow lanes", "global", "blocks"],
)
def test_visits_are_those_that_a_count_of_every_sample_finds(made, nodes, accumulate):
    for node in range(nodes):
        visits = node_visits(made, SHARDS, 1, node=node, nodes=nodes, accumulate=accumulate)
        expected = brute_force(made, 1, node, nodes, accumulate)
        found = sorted((shard, min(steps), max(steps)) for (_, shard), steps in expected.items())
        assert sorted(zip(*(part.tolist() for part in visits), strict=True)) == found
        assert np.all(np.diff(visits.first) >= 0), "in the order in which they are needed"


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_the_bytes_that_are_held_are_those_of_a_count_step_by_step(ahead):
    """Over two epochs, of which the second's first shards are fetched while the first's last ones are read."""
    shard_bytes = [100 + 7 * samples for samples in SHARDS]
    for made in (order(), TrainOrder(244, BATCH, 3), order(4, 1, batch=8)):
        both = [node_visits(made, SHARDS, epoch, node=0, nodes=2, accumulate=1) for epoch in range(2)]
        visits = Visits(*map(np.concatenate, zip(*both, strict=True)))
        stays = list(zip(*(part.tolist() for part in visits), strict=True))
        most = 0
        for step in range(-ahead, 2 * made.steps_per_epoch):
            held = {shard for shard, first, last in stays if first - ahead <= step <= last}
            most = max(most, sum(shard_bytes[shard] for shard in held))
        assert bytes_held(visits, shard_bytes, ahead) == most > 0


def test_lanes_hold_a_small_part_of_the_shards_where_the_global_order_holds_all():
    shards = (50,) * 64
    lanes, whole = TrainOrder(3200, 32, 0, lanes=Lanes(4, 2, shards)), TrainOrder(3200, 32, 0)
    lane_bytes, all_bytes = (
        bytes_held(node_visits(made, shards, 0, node=0, nodes=2, accumulate=1), shards) for made in (lanes, whole)
    )
    assert all_bytes == sum(shards)
    assert lane_bytes <= all_bytes / 8


@pytest.mark.parametrize(
    ("lanes", "nodes", "accumulate", "remedy"),
    [(32, 1, 1, "give 24 lanes"), (8, 3, 1, "give 6 lanes"), (4, 2, 4, "give 8 lanes"), (0, 1, 1, "give 1 lanes")],
)
def test_lanes_that_do_not_divide_are_refused_with_a_number_that_does(lanes, nodes, accumulate, remedy):
    parts = f"{nodes} nodes x accumulate {accumulate} = {nodes * accumulate}"
    with pytest.raises(ValueError, match=f"{lanes} lanes: .* global batch size 24 and be a multiple of {parts}; {remedy}"):
        check_lanes(lanes, 24, nodes, accumulate)
    check_lanes(int(remedy.split()[1]), 24, nodes, accumulate)


def test_an_order_whose_lanes_do_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="5 lanes: their number must divide the global batch size 24"):
        order(lanes=5)


def test_a_bad_sample_is_replaced_from_its_own_shard_unless_that_is_bad_as_a_whole(make_split):
    """Another shard would be one more for the node to fetch."""
    index = make_split(60, 3)
    lanes = Lanes(4, 1, index.shard_samples)
    parts = {"global_batch_size": 12, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 3, "lanes": lanes}
    made = TrainPlan(index.num_samples, size=(8, 8), transform=TrainTransform(), **parts)
    shard_of = np.repeat(np.arange(3), index.shard_samples)
    planned = made.samples(Position(0, 1))
    broken = set(planned[:4].tolist())

    def read(bad: set[int]):
        def one(sample: int) -> int:
            if sample in bad:
                raise BadSample("planted")
            return sample

        return one

    loaded, _ = gather(made, Position(0, 1), Quarantine(index, 1.0), read(broken))
    assert not set(loaded) & broken
    assert np.array_equal(shard_of[loaded], shard_of[planned])

    lost = set(np.flatnonzero(shard_of == shard_of[planned[0]]).tolist())
    loaded, _ = gather(made, Position(0, 1), Quarantine(index, 1.0), read(lost))
    assert len(loaded) == 12
    assert not set(loaded) & lost


def test_shards_hold_as_many_classes_as_chance_gives_where_they_are_mixed_and_few_where_they_are_sorted():
    labels = np.sort(np.random.default_rng(0).integers(0, 50, 4000))
    shards = (100,) * 40
    found, chance = classes_per_shard(np.random.default_rng(1).permutation(labels), shards, 50)
    assert abs(found / chance - 1) < 0.02
    found, chance = classes_per_shard(labels, shards, 50)
    assert found < 4 < 40 < chance


def test_a_state_of_lanes_fits_no_other_order_and_the_other_way_round(make_split):
    index = make_split()
    common = {"size": (8, 8), "transform": TrainTransform(), "global_batch_size": 8, "accumulate": 1, "rank": 0}
    common |= {"world_size": 1, "seed": 11, "device": torch.device("cpu"), "num_threads": 1}

    def loader(lanes: Lanes | None) -> ReferenceLoader:
        return ReferenceLoader(train_task(index, **common, lanes=lanes))

    lanes, others, whole = (
        loader(lanes) for lanes in (Lanes(4, 2, index.shard_samples), Lanes(2, 3, index.shard_samples), None)
    )
    state = json.loads(json.dumps(lanes.state()))
    assert {k: v for k, v in state.items() if k in ("shuffle", "lanes", "lane_window")} == {
        "shuffle": "lanes",
        "lanes": 4,
        "lane_window": 2,
    }
    lanes.restore(state)
    with pytest.raises(ValueError, match=r"\(lanes 4 there, 2 here; lane_window 2 there, 3 here\)"):
        others.restore(state)
    with pytest.raises(ValueError, match=r"shuffle_block not set there, 0 here; shuffle lanes there, not set here; lanes 4"):
        whole.restore(state)
    with pytest.raises(ValueError, match=r"shuffle not set there, lanes here"):
        lanes.restore(whole.state())
    for each in (lanes, others, whole):
        each.close()
