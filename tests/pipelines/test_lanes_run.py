"""Training over lanes by the real command: two ranks, stopped and gone on with, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.config import RecipeError, as_dict, carried_over, load_recipe
from distill.losses import LOSSES
from pipelines.setup.arguments import DEFAULT_RECIPE
from pipelines.setup.run_folder import differences
from shards.digits import load_digits_split
from tests.distill.data.planting import encoded, raw_split
from tests.processes import finished
from tests.runs import arguments, comparable, last_state, metrics, recipe_of

LANES = ("--data.shuffle", "lanes", "--data.lanes", "4", "--data.lane_window", "2")


def test_two_ranks_stopped_inside_an_epoch_go_on_to_the_same_weights_and_others_lanes_are_refused(
    many_shards: Path, tmp_path: Path
):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    finished(arguments(many_shards, straight, *LANES), tmp_path / "log", world_size=2)
    finished(arguments(many_shards, parts, *LANES, "--train.max_steps", "8"), tmp_path / "log", world_size=2)
    state = json.loads((parts / "checkpoints" / (parts / "checkpoints/LAST").read_text() / "checkpoint.json").read_text())
    data, train = state["meta"]["data"], state["meta"]["data"]["train"]
    assert (data["epoch"], data["step"], train["shuffle"], train["lanes"], train["lane_window"]) == (1, 2, "lanes", 4, 2)

    for option, other in (("lanes", "2"), ("lane_window", "3")):
        asked = arguments(many_shards, parts, *LANES, f"--data.{option}", other, "--resume")
        job = finished(asked, tmp_path / f"{option}.log", codes=2)
        assert f"data.{option}: {train[option]} in the run, {other} asked" in job.text()

    finished(arguments(many_shards, parts, *LANES, "--resume"), tmp_path / "log", world_size=2)
    one, other = last_state(straight), last_state(parts)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [line for line in comparable(parts) if "loss/total" in line] == [
        line for line in comparable(straight) if "loss/total" in line
    ]
    assert {line["eval/images"] for line in metrics(parts) if "eval/images" in line} == {37}


def test_shards_sorted_by_class_are_refused_with_both_numbers_and_the_remedy(digits: Path, tmp_path: Path):
    """Ten shards of one class each."""
    images = [encoded(image, "PNG") for image in map(Image.fromarray, load_digits_split("train").images[:100])]
    raw_split(tmp_path / "train", images, 10, [number % 10 for number in range(100)], "0123456789")
    raw_split(tmp_path / "val", images[:10], 1, list(range(10)), "0123456789")
    job = finished(arguments(tmp_path, tmp_path / "run", *LANES), tmp_path / "log", codes=2)
    assert "are sorted by class: 1.0 classes in a shard, 6.5 if they were mixed; say --data.shuffle global" in job.text()
    assert not (tmp_path / "run/manifest.json").exists()
    finished(arguments(tmp_path, tmp_path / "run", "--train.max_steps", "1"), tmp_path / "log")


def test_lanes_that_do_not_divide_among_the_nodes_are_refused_before_anything_is_built(many_shards: Path, tmp_path: Path):
    """Two processes that say they are one on each of two nodes."""
    three = arguments(many_shards, tmp_path / "run", *LANES, "--data.lanes", "3")
    job = finished(three, tmp_path / "log", world_size=2, codes=2, environment={"LOCAL_WORLD_SIZE": "1"})
    assert "data.lanes: 3 lanes: " in job.text()
    assert "2 nodes x accumulate 1 = 2; give 2 lanes" in job.text()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--data.shuffle", "blocks"), "data.shuffle_block: 0, but data.shuffle is 'blocks'; give the number of samples"),
        (
            ("--data.shuffle", "lanes", "--data.lanes", "4", "--data.shuffle_block", "64"),
            "data.shuffle_block: 64, but data.shuffle is 'lanes'; it belongs to 'blocks', say 0",
        ),
        (("--data.lanes", "4"), "data.lanes and data.lane_window: set, but data.shuffle is 'global'; they belong to 'lanes'"),
        (("--data.shuffle", "lanes"), "data.lanes: 32 lanes: their number must divide the global batch size 24"),
        ((*LANES, "--train.accumulate", "8"), "1 nodes x accumulate 8 = 8; give 8 lanes"),
    ],
)
def test_options_that_do_not_fit_the_order_are_refused(more: tuple[str, ...], line: str, digits: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=line):
        recipe_of(digits, tmp_path / "run", *more)


def test_a_recipe_that_chose_the_block_shuffle_by_its_size_alone_means_the_same_as_ever(digits: Path, tmp_path: Path):
    recipe = recipe_of(digits, tmp_path / "run", "--data.shuffle_block", "64")
    assert (recipe.data.shuffle, recipe.data.shuffle_block) == ("blocks", 64)
    assert recipe_of(digits, tmp_path / "run").data.shuffle == "global"


@pytest.mark.parametrize(("block", "name"), [(0, "global"), (64, "blocks")])
def test_a_run_of_before_the_option_goes_on_with_its_order_and_with_no_other(block: int, name: str):
    now = load_recipe(DEFAULT_RECIPE, {"data.shuffle_block": block}, LOSSES)
    before = as_dict(now)
    for key in ("shuffle", "lanes", "lane_window"):
        del before["data"][key]
    assert differences(before, as_dict(now)) == []
    other = {**as_dict(now), "data": {**as_dict(now)["data"], "shuffle": "lanes"}}
    assert differences(before, other) == [f"data.shuffle: {name!r} in the run, 'lanes' asked"]
    assert carried_over(as_dict(now)) == as_dict(now)
