"""A run's folder: what a run that goes on in it may say differently."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.config import RecipeError, as_dict, load_recipe, merge, recipe_fields
from distill.files import locked
from distill.losses import LOSSES
from pipelines.setup.arguments import DEFAULT_RECIPE
from pipelines.setup.run_folder import RunFolder, differences, digest
from pipelines.setup.teacher_cache import weights_sha256


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
    wanted = [] if may_change else [(f"{key}: ", "'another' asked")]
    assert [(line[: len(key) + 2], line[-len("'another' asked") :]) for line in found] == wanted


def test_every_key_outside_the_losses_says_whether_it_may_change():
    before = as_dict(load_recipe(DEFAULT_RECIPE, {}, LOSSES))
    for field in recipe_fields():
        assert (differences(before, merge(before, field.key.split("."), "another")) == []) is field.may_change, field.key


def test_of_two_starts_into_one_new_folder_the_one_that_waited_is_refused(tmp_path: Path, fresh_accelerate: None):
    """A run that ended while the other waited for the folder used to be gone on with, which nobody had asked for."""
    recipe = dataclasses.replace(load_recipe(DEFAULT_RECIPE, {}, LOSSES), out=str(tmp_path / "run"))
    with RunFolder.claim(recipe, False, Accelerator(cpu=True)) as folder:
        folder.write({})
    written = (tmp_path / "run/manifest.json").read_text()
    (tmp_path / "run/manifest.json").unlink()
    first = locked(tmp_path / "run")

    def end() -> None:
        time.sleep(0.3)
        (tmp_path / "run/manifest.json").write_text(written)
        first.close()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(RecipeError, match="already holds a run; add --resume"):
        RunFolder.claim(recipe, False, Accelerator(cpu=True)).__enter__()
    ending.join()
    assert json.loads(written)["recipe"]["out"] == recipe.out


def test_the_checksums_of_weights_are_those_in_the_manifests_of_earlier_versions():
    model = torch.nn.BatchNorm1d(3)  # float32, and an integer without dimensions
    assert digest(model) == "f868796c"
    assert weights_sha256(model) == "b6290e7de2e02a92c8d863123741935ee9c83ee8a5690abe253c7877c0fff35a"
    assert digest(model.half()) == "7472a981"
    assert weights_sha256(model) == "5d71041e7c900ef07b35e9bb5ccdfe9abb5e68465bb42f27f3dae679e6ab3e44"
