"""A run looks at each of its models once, however many backbones read it."""

from datetime import timedelta
from pathlib import Path

import pytest
from accelerate import Accelerator

import distill.models.build
from distill.agreement import Control
from pipelines.imagenet import main
from pipelines.setup.build import build, rehearse
from pipelines.setup.data import build_splits
from pipelines.setup.teacher import evaluate_teacher
from tests.runs import arguments, recipe_of


def test_a_run_makes_one_control(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None):
    """Each opens a process group and waits at a barrier for the others."""
    made = []
    begin = Control.__init__

    def counted(control: Control, *given: timedelta) -> None:
        made.append(control)
        begin(control, *given)

    monkeypatch.setattr(Control, "__init__", counted)
    assert main(arguments(digits, tmp_path / "run", "--train.max_steps", "1")) == 0
    assert len(made) == 1


def test_a_run_and_its_rehearsal_probe_each_of_their_models_once(
    digits: Path, tmp_path: Path, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
):
    """A teacher in bf16 that is evaluated, region logits of both models, an average of the student."""
    probed = []
    examine = distill.models.build.examine

    def counted(model, spec, name):
        probed.append(name)
        return examine(model, spec, name)

    monkeypatch.setattr(distill.models.build, "examine", counted)
    more = ["--ema.enabled", "true", "--teacher.evaluate", "true", "--teacher.precision", "bf16"]
    recipe = recipe_of(digits, tmp_path, *more)
    splits = build_splits(recipe, accelerator)
    run, models = build(recipe, accelerator, splits, Control())
    figures = evaluate_teacher(recipe, run, models, splits.val)
    assert figures["images"] == splits.val.num_samples
    assert probed == ["cifar_resnet8", "cifar_resnet14"]
    student, classifier = models.student, run.classifier
    assert student.region_head is not None
    assert models.teacher.backbone.region_head is not None
    assert classifier.anatomy is student.anatomy
    assert classifier.model is run.average.module
    rehearse(recipe, accelerator, splits)
    assert probed == 2 * ["cifar_resnet8", "cifar_resnet14"]
    run.checkpoints.close()
    for loader in (run.train_loader, run.eval_loader):
        loader.close()
