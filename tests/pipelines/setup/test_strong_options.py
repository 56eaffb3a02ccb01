"""The options of strong recipes reach the loader and the optimiser of a run."""

from pathlib import Path

import pytest

from distill.agreement import Control
from distill.config import RecipeError
from distill.engine import train_epoch
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import build_accelerator
from tests.runs import metrics, recipe_of

STRONG = [
    *("--teacher", "none", "--loss.sdd", "null", "--loss.msdcrd", "null", "--loss.kd", "null", "--student", "resnet10t"),
    *("--augment.repeats", "3", "--augment.three_augment", "true", "--augment.color_jitter", "0.3"),
    *("--augment.crop", "simple_random", "--optim.layer_decay", "0.5", "--optim.layer_decay_min_scale", "0.05"),
    *("--loss.cross_entropy.binary", "true", "--train.max_steps", "2"),
]


def test_a_step_is_made_of_repeated_views_and_each_layer_has_its_share_of_the_rate(
    digits: Path, tmp_path: Path, fresh_accelerate: None
):
    recipe = recipe_of(digits, tmp_path, *STRONG)
    accelerator = build_accelerator(recipe)
    accelerator.init_trackers("trackers")
    run, _ = build(recipe, accelerator, build_splits(recipe, accelerator), Control())
    run.reporter.start(0, 0)
    first = next(iter(run.train_loader.epoch(0)))
    assert len(set(first.sample_ids.tolist())) == 24 // 3
    assert run.train_loader.task.plan.num_layers == 4
    train_epoch(run)
    groups = run.optimizer.param_groups
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125, 0.0625, 0.05}
    whole = next(line["lr"] for line in reversed(metrics(tmp_path)) if "lr" in line)
    assert whole == max(group["lr"] for group in groups)
    assert all(group["lr"] == pytest.approx(whole * group["lr_scale"]) for group in groups)
    run.reporter.close()
    run.checkpoints.close()
    for loader in (run.train_loader, run.eval_loader):
        loader.close()


def test_a_student_that_does_not_name_its_layers_is_refused(digits: Path, tmp_path: Path, fresh_accelerate: None):
    recipe = recipe_of(digits, tmp_path, "--optim.layer_decay", "0.5")
    accelerator = build_accelerator(recipe)
    with pytest.raises((RecipeError, ValueError), match="the student does not name its layers"):
        build(recipe, accelerator, build_splits(recipe, accelerator), Control())
