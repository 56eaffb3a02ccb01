"""timm's saved arguments as a recipe: every argument is in the recipe, named as lost, or without any effect on the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from distill.config import load_recipe
from distill.errors import RequestError
from distill.losses import LOSSES
from distill.optim import learning_rate_schedule
from distill.protocols import Progress
from distill.recipe import Recipe
from distill.yaml12 import parse_yaml
from pipelines.setup.arguments import parse
from pipelines.setup.timm_args import BELONG, NO_RESULT, converted

DEFAULTS = Path(__file__).with_name("timm_args.yaml")
"""What train.py saves of a run without any argument: its parser's defaults (timm's repository at aa4b5850)."""
ARGUMENTS: dict[str, Any] = parse_yaml(DEFAULTS.read_text())
RSB_A2 = parse_yaml("""
{opt: lamb, lr: 5.0e-3, weight_decay: 0.02, batch_size: 512, epochs: 300, warmup_lr: 1.0e-4, min_lr: 1.0e-6, amp: true,
 aa: rand-m7-mstd0.5-inc1, mixup: 0.1, cutmix: 1.0, smoothing: 0.0, drop_path: 0.05, aug_repeats: 3, crop_pct: 0.95,
 bce_loss: true, bce_target_thresh: 0.2, interpolation: bicubic}
""")
DISTILLED = parse_yaml("{kd_model_name: resnet101, bce_loss: true, mixup: 0.2, torchcompile: inductor, clip_grad: 1.0, aa: 3a}")
SITUATIONS: list[dict[str, Any]] = [
    {},
    DISTILLED,
    {"lr": None, "sched": "step"},
    {"sched": "multistep", "kd_model_name": "resnet101", "kd_distill_type": "token"},
    {"amp": True, "train_interpolation": "bilinear"},
]
"""Arguments that others need to do anything."""


def recipe_from(changes: dict[str, Any], **overrides: Any) -> Recipe:
    return load_recipe(None, {**converted({**ARGUMENTS, **changes}, 2048).values, **overrides}, LOSSES)


def another(value: Any) -> Any:
    """A value unlike this one, of a type that its argument takes."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [5, 7, 11]
    return {"": "x", "default": "x"}.get(value, f"{value}x") if isinstance(value, str) else (value or 0) + 0.5


OTHER = parse_yaml("""
{opt: adamw, sched: constant, amp_dtype: bfloat16, interpolation: bicubic, remode: const, aa: rand-m7, model: resnet18,
 input_size: [3, 192, 192], img_size: 192, scale: [0.5, 1.0], ratio: [0.9, 1.1], model_kwargs: {a: 1}, decay_epochs: 30,
 opt_kwargs: {a: 1}, opt_betas: [0.9, 0.95], torchcompile: eager, kd_model_name: resnet50, lr_base_scale: sqrt,
 grad_accum_steps: 2, batch_size: 64, torchcompile_mode: max-autotune, pretrained_path: a.pth, initial_checkpoint: a.pth,
 drop_connect: 0.1, aug_repeats: 3, clip_grad: 2.0, kd_token_distill_type: hard, kd_distill_type: feature, clip_mode: agc,
 train_interpolation: bicubic}
""")


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - NO_RESULT - {each for names in BELONG.values() for each in names}))
def test_an_argument_that_is_changed_changes_the_recipe_or_is_named(name):
    found = []
    for situation in SITUATIONS:
        before = {**ARGUMENTS, **situation}
        after = {**before, name: OTHER.get(name, another(before[name]))}
        # without a batch from the command line, on which the batch's own argument would have no effect
        if converted(before) != converted(after):
            found.append(situation)
    assert found, f"{name} is lost without a word"


def test_what_train_py_does_without_any_argument_loses_nothing_and_its_differences_are_named():
    found = converted(ARGUMENTS)
    assert found.lost == []
    named = {line.split(":")[0] for line in found.otherwise}
    assert named == {"dist_bn", "train_interpolation", "batch_size", "warmup_prefix", "warmup_lr", "sched_on_updates"}
    assert load_recipe(None, found.values, LOSSES).optim.options == {"nesterov": True}


def test_what_has_no_counterpart_is_named_with_its_value():
    changes = {"vflip": 0.5, "aa": "augmix-m5", "jsd_loss": True, "aug_splits": 3, "sched": "tanh", "new_option": 3}
    changes |= {"kd_model_name": "resnet50", "kd_distill_type": "feature", "naflex_loader": True, "naflex_max_seq_len": 100}
    found = converted({**ARGUMENTS, **changes})
    named = [line.rsplit(": ", 1)[0] for line in found.lost]
    expected = {"vflip: 0.5", "aa: augmix-m5", "jsd_loss: True", "aug_splits: 3", "sched: tanh", "new_option: 3"}
    assert set(named) == expected | {"kd_model_name: resnet50", "kd_distill_type: feature", "naflex_loader: True"}
    assert load_recipe(None, found.values, LOSSES).teacher.name == "none"


def test_resnet_strikes_back_a2_becomes_its_recipe():
    recipe = recipe_from(RSB_A2)
    assert recipe.loss["cross_entropy"].items() >= {"binary": True, "threshold": 0.2, "label_smoothing": 0.0}.items()
    assert (recipe.optim.name, recipe.optim.learning_rate, recipe.optim.weight_decay) == ("lamb", 5e-3, 0.02)
    assert (recipe.augment.repeats, recipe.augment.mixup, recipe.augment.cutmix) == (3, 0.1, 1.0)
    assert (recipe.augment.rand_augment, recipe.augment.color_jitter) == ("rand-m7-mstd0.5-inc1", 0.0)
    assert not recipe.optim.decay_bias_and_norm
    assert recipe.schedule.minimum == pytest.approx(2e-4)
    assert recipe.train.mixed_precision == "fp16"


def test_procedures_of_papers_lose_nothing():
    assert converted({**ARGUMENTS, **RSB_A2}, 2048).lost == []
    assert converted({**ARGUMENTS, "drop_path": None, "drop_connect": 0.1}).values["student.drop_path_rate"] == 0.1


def test_a_file_of_an_older_timm_is_read_with_timms_defaults_which_are_what_is_named():
    found = converted({"model": "resnet18"}, 256)
    assert found.lost == []
    assert not [line for line in found.otherwise if ": None:" in line]
    assert "dist_bn: reduce" in found.otherwise[0]


@pytest.mark.parametrize(
    ("opt", "expected"), [("sgd", 0.1 * 8), ("lamb", 0.1 * 8**0.5), ("adamw", 0.1 * 8**0.5), ("rmsproptf", 0.1 * 8)]
)
def test_a_rate_that_is_not_given_follows_timms_rule_of_the_global_batch(opt, expected):
    assert recipe_from({"lr": None, "opt": opt}).optim.learning_rate == pytest.approx(expected)


def test_timms_own_distillation_becomes_kd_with_its_two_kinds_of_weights():
    independent = recipe_from({"kd_model_name": "resnet101", "distill_loss_weight": 2.0}).loss
    assert independent["cross_entropy"]["weight"] == 1.0
    assert independent["kd"].items() >= {"weight": 2.0, "temperature": 4.0}.items()
    complementary = recipe_from({"kd_model_name": "resnet101", "task_loss_weight": 0.3}).loss
    assert (complementary["cross_entropy"]["weight"], complementary["kd"]["weight"]) == (0.3, pytest.approx(0.7))


STEPPED = [
    {"sched": "step", "decay_epochs": 2.5, "decay_rate": 0.9},
    {"sched": "multistep", "decay_milestones": [6, 9], "decay_rate": 0.1},
    {"sched": "constant"},
]


@pytest.mark.parametrize(
    ("schedule", "prefix"),
    [*((each, prefix) for each in STEPPED for prefix in (False, True)), ({"sched": "cosine", "min_lr": 1e-3}, True)],
)
def test_after_the_warm_up_each_epoch_begins_with_timms_rate(schedule, prefix):
    """timm's scheduler is the oracle. Its cosine is ours where the warm-up is a prefix, and named as a difference elsewhere."""
    changes = {"lr": 0.2, "epochs": 12, "warmup_epochs": 2, "warmup_prefix": prefix, **schedule}
    recipe = recipe_from(changes)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    options = {"num_epochs": 12, "warmup_epochs": 2, "warmup_prefix": prefix, **schedule}
    scheduler, epochs = create_scheduler_v2(optimizer, **options)
    assert recipe.train.epochs == epochs
    asked = recipe.schedule
    ours = learning_rate_schedule(
        asked.name,
        peak=0.2,
        warmup_epochs=asked.warmup_epochs,
        decay_epochs=asked.decay_epochs,
        decay_factor=asked.decay_factor,
        minimum=asked.minimum,
    )
    for epoch in range(2, epochs):
        scheduler.step(epoch)
        assert ours(Progress(10 * epoch, 10, 10 * epochs)) == pytest.approx(optimizer.param_groups[0]["lr"]), epoch


def test_the_command_prints_a_recipe_that_loads_strictly_and_takes_changes(tmp_path, capsys):
    changes = ["--loss.sdd.weight", "2", "--teacher", "resnet34", "--train.global_batch_size", "1024"]
    with pytest.raises(SystemExit) as ended:
        parse(["--from-timm-args", str(DEFAULTS), *changes], LOSSES)
    assert not ended.value.code
    text = capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml", {}, LOSSES)
    assert (recipe.teacher.name, set(recipe.loss)) == ("resnet34", {"cross_entropy", "sdd"})
    assert recipe.train.global_batch_size == 1024
    assert "# Differs:   dist_bn: reduce: " in text
    assert "batch_size: 128" not in text


def test_what_is_no_args_yaml_is_refused(tmp_path):
    file = tmp_path / "args.yaml"
    for text, said in (
        (None, "no such file; it is args.yaml in the output folder"),
        ("student: {name: a}", "has no `model`"),
        ("model: [", "not plain YAML"),
        ("model: null", "has no `model`"),
        ("model: resnet18\nbatch_size: many", "a value has another type than timm saves"),
        ("model: resnet18\ncolor_jitter: []", "a value has another type than timm saves"),
        ("model: resnet18\nepochs: 0", r"args\.yaml and the command line: train\.epochs: 0"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(RequestError, match=said):
            parse(["--from-timm-args", str(file)], LOSSES)
    with pytest.raises(RequestError, match=r"train\.global_batch_size: \"x\": input should be a valid integer"):
        parse(["--from-timm-args", str(DEFAULTS), "--train.global_batch_size", "x"], LOSSES)
    with pytest.raises(RequestError, match="--from-timm-args makes a recipe of its own; drop either"):
        parse(["--from-timm-args", str(DEFAULTS), "--recipe", "a.yaml"], LOSSES)
