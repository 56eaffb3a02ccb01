"""A run's folder: what a run that goes on in it may say differently."""

import pytest

from distill.config import as_dict, load_recipe, merge, recipe_fields
from distill.losses import LOSSES
from pipelines.setup.arguments import DEFAULT_RECIPE
from pipelines.setup.run_folder import differences


@pytest.mark.parametrize(
    ("key", "may_change"),
    [
        ("out", True),
        ("data.train", True),  # paths: data may move, the manifest holds their checksum
        ("train.accumulate", True),
        ("report.log_every", True),
        ("seed", False),
        ("data.shuffle_block", False),
        ("train.global_batch_size", False),
        ("loss.sdd.temperature", False),
    ],
)
def test_only_what_does_not_change_the_computation_may_change(key: str, may_change: bool):
    before = as_dict(load_recipe(DEFAULT_RECIPE, {}, LOSSES))
    found = differences(before, merge(before, key.split("."), "another"))
    assert len(found) == (0 if may_change else 1)
    assert all(line.startswith(f"{key}: ") and line.endswith("'another' asked") for line in found)


def test_every_key_outside_the_losses_says_whether_it_may_change():
    before = as_dict(load_recipe(DEFAULT_RECIPE, {}, LOSSES))
    for field in recipe_fields():
        assert (differences(before, merge(before, field.key.split("."), "another")) == []) is field.may_change, field.key
