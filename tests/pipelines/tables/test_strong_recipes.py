"""The strong recipes beside the papers' cells: what their sources say, and networks and losses that can be built."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import as_dict, load_recipe
from distill.losses import LOSSES
from distill.models.build import input_spec_of
from distill.models.describe import Uninitialised, create_outline, probed_with_noise
from distill.optim import layer_scales
from distill.protocols import DataFacts
from distill.recipe import Recipe
from distill.yaml12 import parse_yaml
from pipelines.setup.models import build_criteria

FOLDER = Path(__file__).parents[3] / "pipelines" / "recipes" / "imagenet"
STRONG = sorted(path for path in FOLDER.glob("strong_*.yaml") if not path.read_text().startswith("# Cell:"))
RSB = parse_yaml("""
{optim.name: lamb, optim.weight_decay: 0.02, optim.decay_bias_and_norm: false, train.global_batch_size: 2048,
 schedule.name: cosine, schedule.warmup_epochs: 5, augment.mixup: 0.1, augment.cutmix: 1.0, augment.erasing: 0,
 ema.enabled: false, augment.cutmix_share: 0.5, data.crop_fraction: 0.95, data.interpolation: bicubic,
 loss.cross_entropy.threshold: 0.2}
""")
SOURCES: dict[str, dict[str, Any]] = parse_yaml("""
strong_a2_resnet50_baseline:
  {train.epochs: 300, optim.learning_rate: 0.005, augment.repeats: 3, augment.rand_augment: rand-m7-mstd0.5-inc1,
   data.image_size: 224, data.eval_image_size: 0, student.drop_path_rate: 0.05}
strong_a3_resnet50_baseline:
  {train.epochs: 100, optim.learning_rate: 0.008, augment.repeats: 1, augment.rand_augment: rand-m6-mstd0.5-inc1,
   data.image_size: 160, data.eval_image_size: 224, student.drop_path_rate: 0}
strong_deit3_small_baseline:
  {train.epochs: 800, train.global_batch_size: 2048, optim.name: lamb, optim.learning_rate: 0.004, optim.weight_decay: 0.05,
   optim.decay_bias_and_norm: false, student.drop_path_rate: 0.05, augment.mixup: 0.8, augment.cutmix: 1.0,
   augment.repeats: 3, augment.three_augment: true, augment.color_jitter: 0.3, augment.erasing: 0,
   schedule.warmup_epochs: 5, loss.cross_entropy.threshold: 0}
""")
"""Their sources' numbers, written down apart from the recipes."""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_a_baseline_has_its_sources_numbers(name):
    recipe = flat(as_dict(load_recipe(FOLDER / f"{name}.yaml", {}, LOSSES)))
    expected = {**({} if "deit3" in name else RSB), **SOURCES[name]}
    assert {key: recipe[key] for key in expected} == expected
    assert recipe["loss.cross_entropy.binary"]
    assert recipe["loss.cross_entropy.label_smoothing"] == 0
    assert recipe["schedule.minimum"] * recipe["optim.learning_rate"] == pytest.approx(1e-5 if "deit3" in name else 1e-6)


def criteria_of(recipe: Recipe, stack: ExitStack) -> dict[str, Any]:
    def network(name: str, frozen: bool, **kwargs: Any):
        model = create_outline(name, **kwargs)
        side = {"height": kwargs["img_size"], "width": kwargs["img_size"]} if "img_size" in kwargs else {}
        spec = dataclasses.replace(input_spec_of(model), **side)
        return stack.enter_context(probed_with_noise(model, name=name, input_spec=spec, frozen=frozen))

    student, teacher = network(recipe.student.name, False, num_classes=1000, **recipe.student.model_kwargs), None
    layer_scales(student.model, 0.75)  # every one of these students names its layers
    if recipe.teacher.name != "none":
        classes = {"num_classes": 0} if "dinov2" in recipe.teacher.name else {"num_classes": 1000}
        teacher = network(recipe.teacher.name, True, **{**classes, **recipe.teacher.model_kwargs})
        assert (teacher.input_spec.height, student.input_spec.height) == (224, 224)
    return build_criteria(recipe, student, teacher, DataFacts(1000, torch.arange(1000), recipe.train.global_batch_size))


@pytest.mark.parametrize("path", STRONG, ids=lambda path: path.stem)
def test_networks_and_losses_of_each_can_be_built_and_its_header_is_whole(path):
    text, recipe = path.read_text(), load_recipe(path, {}, LOSSES)
    assert all(f"# {key}:" in text for key in ("Command", "Source", "Expected", "Differs"))
    assert "ours: not run" in text
    assert f"--recipe pipelines/recipes/imagenet/{path.name}" in text
    assert not recipe.augment.rand_augment or not recipe.augment.color_jitter
    with ExitStack() as stack, Uninitialised():
        assert set(criteria_of(recipe, stack)) == set(recipe.loss)


def test_there_is_a_vit_student_of_a_convolutional_teacher_and_of_one_without_a_classifier():
    pairs = {
        (recipe.teacher.name.split(".")[0], recipe.student.name) for recipe in (load_recipe(p, {}, LOSSES) for p in STRONG)
    }
    assert {("regnety_160", "deit3_small_patch16_224"), ("vit_base_patch14_dinov2", "deit3_small_patch16_224")} <= pairs
