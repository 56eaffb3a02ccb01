"""A teacher without a classifier (DINO, MAE, CLIP's image towers) in real runs."""

import json
import math
from pathlib import Path

import pytest
from accelerate import Accelerator

from distill.agreement import Control
from distill.config import RecipeError
from distill.engine import fit
from distill.recipe import Teacher
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.teacher import check_unclassified
from tests.processes import finished
from tests.runs import arguments, metrics, recipe_of

READ_NO_LOGITS = {
    "msdcrd": {"categories": "labels"},
    "fitnet": {"match": "pool"},
    "at": {},
    "sp": {"scales": [1, 2]},
    "pkt": {},
    "rkd": {},
    "crd": {"negatives": 16},
    "wcord": {"negatives": 16},
    "wkd_feature": {"grid": 1},
    "mgd": {},
    "reviewkd": {},
    "ofd": {},
    "semckd": {},
    "vid": {},
    "cc": {},
    "nst": {},
    "ab": {"match": "pool"},
    "ft": {},
}
"""Every loss that reads feature maps, regions of them, pre-activations or embeddings, with options that fit small maps."""


def losses(chosen: dict[str, dict]) -> list[str]:
    """These losses beside cross-entropy, in the place of those of the digits recipe."""
    found = ["--loss.sdd", "null", *(() if "msdcrd" in chosen else ("--loss.msdcrd", "null"))]
    for name, options in chosen.items():
        for key, value in {"weight": 1e-3, **options}.items():
            found += [f"--loss.{name}.{key}", json.dumps(value)]
    return found


def teacher(name: str, **kwargs: object) -> list[str]:
    return ["--teacher", name, "--teacher.model_kwargs", json.dumps({"num_classes": 0, **kwargs})]


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("convnext_atto", {}),
        ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}),
        ("resnet10t", {}),
    ],
)
def test_it_trains_two_steps_with_every_loss_that_reads_no_logits(
    name: str, kwargs: dict, digits: Path, tmp_path: Path, accelerator: Accelerator
):
    asked = [*teacher(name, **kwargs), *losses(READ_NO_LOGITS), "--train.max_steps", "2", "--train.global_batch_size", "8"]
    recipe = recipe_of(digits, tmp_path, *asked)
    run, models = build(recipe, accelerator, build_splits(recipe, accelerator), Control())
    fit(run)
    run.checkpoints.close()
    for loader in (run.train_loader, run.eval_loader):
        loader.close()
    assert models.teacher.backbone.num_classes == 0
    steps = [line for line in metrics(tmp_path) if "loss/total" in line]
    assert len(steps) == 2
    assert all(math.isfinite(line[f"loss/{each}"]) and line[f"loss/{each}"] != 0 for line in steps for each in READ_NO_LOGITS)


SMALL_VIT = teacher("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)


def test_the_command_distils_from_it_and_says_that_it_is_not_evaluated(digits: Path, tmp_path: Path):
    chosen = {name: READ_NO_LOGITS[name] for name in ("sp", "rkd", "fitnet")}
    asked = [*SMALL_VIT, *losses(chosen), "--teacher.evaluate", "true"]
    job = finished(arguments(digits, tmp_path / "run", *asked), tmp_path / "log")
    assert "teacher vit_tiny_patch16_224: not evaluated, for it has no classifier" in job.text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["teacher_top1"], summary["steps"]) == (None, 12)
    assert all(line[f"loss/{name}"] > 0 for line in metrics(tmp_path / "run") if "loss/total" in line for name in chosen)


def test_the_command_refuses_a_loss_that_reads_its_logits_by_name_before_the_first_step(digits: Path, tmp_path: Path):
    finished(arguments(digits, tmp_path / "run", *SMALL_VIT), tmp_path / "log", codes=2)
    [line] = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error:")]
    assert line.startswith(
        "error: loss.sdd: vit_tiny_patch16_224 has no classifier (num_classes 0) and cannot give region logits; take a loss"
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_top1_cannot_be_expected_of_it():
    check_unclassified(Teacher(name="vit_small_patch14_dinov2"))
    with pytest.raises(
        RecipeError, match=r"teacher.expected_top1 73.3: resnet34 has no classifier and no top-1; set it to null"
    ):
        check_unclassified(Teacher(name="resnet34", expected_top1=73.3))
