"""`optim.name dot` by the main command: on two processes and in micro-batches, killed and resumed, with a teacher to train."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from distill.config import RecipeError
from pipelines.setup.machine import build_accelerator
from tests.processes import finished, start
from tests.runs import DOT, FP16, arguments, assert_same_run, last_state, recipe_of, steps_of


def test_two_processes_and_micro_batches_make_the_steps_of_one(digits: Path, tmp_path: Path):
    """At the same global batch, BatchNorm frozen: weights and both momenta, after three steps."""
    common = [*DOT, "--student.batchnorm", "frozen", "--loss.msdcrd", "null", "--loss.ctkd.weight", "1"]
    common += ["--train.max_steps", "3", "--optim.learning_rate", "0.005"]  # rounding grows with every step
    ends = []
    for name, world_size, accumulate in (("one", 1, "1"), ("two", 2, "1"), ("parts", 1, "2")):
        options = arguments(digits, tmp_path / name, *common, "--train.accumulate", accumulate)
        finished(options, tmp_path / f"{name}.log", world_size)
        ends.append(last_state(tmp_path / name))
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["world_size"] == 2
    assert sum(name.endswith("/distillation_buffer") for name in ends[0]) > 10
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=1e-4, atol=1e-6)


def test_killed_and_resumed_is_the_uninterrupted_run(digits: Path, tmp_path: Path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    more = [*DOT, "--train.accumulate", "2", "--ema.enabled", "true", "--train.checkpoint_every", "2"]
    finished(arguments(digits, straight, *more), tmp_path / "straight.log", world_size=2)
    command = arguments(digits, killed, *more, "--resume")
    job = start(command, tmp_path / "killed.log", world_size=2)
    job.wait_until(lambda: (killed / "metrics.jsonl").is_file() and len(steps_of(killed)) >= 5)
    os.kill(job.ranks[-1].pid, signal.SIGKILL)
    job.kill()
    finished(command, tmp_path / "killed.log", world_size=2)
    assert "going on from step" in (tmp_path / "killed.log").read_text()
    assert_same_run(straight, killed)


def test_a_teacher_that_the_run_trains_is_trained_by_sgd(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    more = ["--teacher-weights", "train", "--teacher.epochs", "1", "--train.max_steps", "2"]
    finished(arguments(digits, out, *DOT, *more), tmp_path / "log")
    theirs = json.loads((out / "teacher" / "manifest.json").read_text())["recipe"]["optim"]
    assert (theirs["name"], theirs["momentum"], theirs["options"]) == ("sgd", 0.9, {})
    assert json.loads((out / "manifest.json").read_text())["recipe"]["optim"]["name"] == "dot"


def test_fp16_is_refused_also_where_the_launcher_says_it(digits: Path, tmp_path: Path, fresh_accelerate: None):
    with pytest.raises(RecipeError, match=r"optim.name: dot keeps a gradient that fp16's scaler does not know; take "):
        build_accelerator(recipe_of(digits, tmp_path, *DOT, *FP16))
