"""`train.channels_last: auto`: what is measured, that measuring leaves no trace, and that a resumed run keeps the decision."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.config import RecipeError
from distill.losses import LOSSES
from distill.protocols import DataFacts
from pipelines.setup.arguments import parse
from pipelines.setup.memory_formats import MANIFEST, Faster, Formats, choose_formats
from pipelines.setup.models import build_models
from tests.processes import finished
from tests.runs import arguments, assert_same_run, recipe_of

AUTO = ["--train.channels_last", "auto", "--student.drop_rate", "0.1"]
CPU = torch.device("cpu")
DATA = DataFacts(144, torch.zeros(144, dtype=torch.int64), 24)


def test_measuring_changes_no_weight_gradient_statistic_mode_or_random_state(
    digits: Path, tmp_path: Path, accelerator: Accelerator
):
    student = build_models(recipe_of(digits, tmp_path, *AUTO), 10, DATA, CPU).student
    before = copy.deepcopy(student.state_dict())
    strides = [p.stride() for p in student.parameters()]
    state = torch.get_rng_state()
    found = Faster(accelerator, student, batch=4, backward=True)
    assert all(milliseconds > 0 for milliseconds in found.milliseconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert [p.stride() for p in student.parameters()] == strides
    assert all(p.grad is None for p in student.parameters())
    assert student.training


def test_the_faster_format_wins_and_a_tie_keeps_that_of_the_images(digits: Path, tmp_path: Path, accelerator: Accelerator):
    found = Faster(
        accelerator, build_models(recipe_of(digits, tmp_path, *AUTO), 10, DATA, CPU).student, batch=2, backward=False
    )
    for with_and_without, channels_last in (([1.0, 2.0], True), ([2.0, 1.0], False), ([1.01, 1.0], True)):
        found.milliseconds = with_and_without
        assert found.channels_last is channels_last


def test_each_model_gets_the_format_that_the_run_began_with(digits: Path, tmp_path: Path, accelerator: Accelerator):
    """The student's weights and the images in one, the teacher's in the other."""
    began = Formats(student=False, teacher=True)
    (tmp_path / "manifest.json").write_text(json.dumps({MANIFEST: began._asdict()}))

    def choose(*known):
        return choose_formats(*known, accelerator=accelerator, batch=4)

    models = build_models(recipe_of(digits, tmp_path, *AUTO), 10, DATA, CPU, choose)
    assert models.formats == began
    assert models.formats.names() == ["teacher"]
    for backbone, channels_last in ((models.student, False), (models.teacher, True)):
        weight = next(p for p in backbone.parameters() if p.ndim == 4 and min(p.shape) > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    seen = []
    models.teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    models.served(torch.rand(2, 3, 32, 32))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_a_resumed_run_takes_the_formats_it_began_with_and_is_the_uninterrupted_run(digits: Path, tmp_path: Path):
    """A run that begins in a folder whose manifest names other formats than are measured is the uninterrupted one."""
    first, whole = tmp_path / "first", tmp_path / "whole"
    finished(arguments(digits, first, *AUTO, "--train.max_steps", "1"), tmp_path / "log")
    assert "channels_last: " in (tmp_path / "log").read_text()
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest[MANIFEST].keys() == {"student", "teacher"}
    other = {name: not chosen for name, chosen in manifest[MANIFEST].items()}
    for folder in (first, whole):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({**manifest, MANIFEST: other}))
    finished(arguments(digits, whole, *AUTO, "--train.max_steps", "3", "--resume"), tmp_path / "whole.log")
    for steps in ("2", "3"):
        finished(arguments(digits, first, *AUTO, "--train.max_steps", steps, "--resume"), tmp_path / "first.log")
    assert_same_run_but_for_evaluations(first, whole)
    assert json.loads((first / "manifest.json").read_text())[MANIFEST] == other
    assert "as the run began" in (tmp_path / "first.log").read_text()


def assert_same_run_but_for_evaluations(first: Path, whole: Path) -> None:
    """The interrupted one was also evaluated where it stopped."""
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if not ("eval/top1" in line and line["step"] < 3)]
    (first / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert_same_run(whole, first)


def test_what_is_no_format_is_refused(digits: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match=r"train\.channels_last"):
        parse(arguments(digits, tmp_path, "--train.channels_last", "fastest"), LOSSES)
