"""Evaluation at another size than training's: what the student sees, and students that do not take it."""

from pathlib import Path

import pytest
import torch

from distill.agreement import Control
from distill.config import RecipeError
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import build_accelerator
from tests.runs import recipe_of


def test_evaluation_has_images_of_its_own_size_and_training_keeps_its(digits: Path, tmp_path: Path, fresh_accelerate: None):
    recipe = recipe_of(digits, tmp_path, "--data.eval_image_size", "48", "--ema.enabled", "true")
    accelerator = build_accelerator(recipe)
    run, models = build(recipe, accelerator, build_splits(recipe, accelerator), Control())
    seen: list[torch.Size] = []
    for model in (models.student.model, run.classifier.model):
        model.register_forward_pre_hook(lambda module, images: seen.append(images[0].shape[-2:]))
        model.stem.register_forward_pre_hook(lambda module, images: seen.append(images[0].shape[-2:]))
    evaluated, trained = next(iter(run.eval_loader.epoch(0))), next(iter(run.train_loader.epoch(0)))
    assert evaluated.images.shape[1:3] == (48, 48)
    assert trained.images.shape[1:3] == (32, 32)
    with torch.no_grad():
        run.classifier.eval()(evaluated.images.permute(0, 3, 1, 2) / 255)
        assert set(seen) == {(48, 48)}
        seen.clear()
        models.student(trained.images.permute(0, 3, 1, 2) / 255)
        assert set(seen) == {(32, 32)}
    run.reporter.close()
    for closing in (run.train_loader, run.eval_loader, run.checkpoints):
        closing.close()


def test_a_student_of_one_size_only_is_refused_before_it_is_trained(digits: Path, tmp_path: Path, fresh_accelerate: None):
    student = ("--student", "vit_tiny_patch16_224", "--data.image_size", "32", "--loss.msdcrd", "null", "--loss.sdd", "null")
    recipe = recipe_of(digits, tmp_path, *student, "--loss.kd.weight", "1", "--data.eval_image_size", "48")
    accelerator = build_accelerator(recipe)
    with pytest.raises(RecipeError, match=r"data.eval_image_size: 48: vit_tiny_patch16_224 does not take it: "):
        build(recipe, accelerator, build_splits(recipe, accelerator), Control())
