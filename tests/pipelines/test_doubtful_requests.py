"""Requests that are refused in one line before anything is written, and those that are done with a warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.losses import LOSSES
from distill.recipe_checks import doubts
from pipelines.setup.arguments import parse
from shards.prepare import main as prepare
from tests.processes import finished
from tests.runs import arguments
from tests.shards.preparing import image_bytes

ROOT = Path(__file__).parents[2]
DIGITS = ["--loss.sdd", "null", "--loss.msdcrd", "null"]


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 24 images of one class."""
    folder = tmp_path_factory.mktemp("one")
    for split in ("train", "val"):
        (folder / "images" / split / "cat").mkdir(parents=True)
        for number in range(24):
            (folder / f"images/{split}/cat/{number}.png").write_bytes(image_bytes(number, (32, 32), "PNG"))
    assert prepare(["folder", "--source", str(folder / "images"), "--out", str(folder), "--one-class"]) == 0
    return folder


def refused(argv: list[str], out: Path, log: Path) -> str:
    """The last line of a run that is refused with exit code 2, without a traceback and without anything in its folder."""
    text = finished(argv, log, codes=2).text()
    assert "Traceback" not in text
    assert [path.name for path in out.rglob("*") if path.name != ".lock"] == []
    return text.splitlines()[-1]


def test_a_micro_batch_of_one_image_under_batchnorm_is_refused_with_its_numbers(digits: Path, tmp_path: Path):
    out, single = tmp_path / "run", ["--train.global_batch_size", "4", "--train.accumulate", "4"]
    said = refused(arguments(digits, out, *single), out, tmp_path / "log")
    assert "student cifar_resnet8: its BatchNorm would see 1 image at a time: train.global_batch_size 4 over" in said
    assert (
        "processes: 1, each with train.accumulate 4; raise the batch, lower accumulate, or say student.batchnorm frozen" in said
    )
    frozen = [*single, *DIGITS, "--loss.kd.weight", "1", "--student.batchnorm", "frozen", "--train.max_steps", "2"]
    finished(arguments(digits, out, *frozen), tmp_path / "log")


def test_losses_over_classes_are_refused_where_the_data_have_one(one_class: Path, tmp_path: Path):
    out = tmp_path / "run"
    for loss in ("dkd", "sdd"):
        asked = arguments(one_class, out, *DIGITS, f"--loss.{loss}.weight", "1")
        said = refused(asked, out, tmp_path / "log")
        assert f"loss.{loss}: compares the classes of an image, and the data have one; drop it" in said


def test_a_teacher_that_no_loss_reads_is_refused(digits: Path, tmp_path: Path):
    out = tmp_path / "run"
    said = refused(arguments(digits, out, *DIGITS), out, tmp_path / "log")
    assert "teacher.name: cifar_resnet14, but no loss reads a teacher (cross_entropy)" in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--schedule.warmup_epochs", "2"], "schedule.warmup_epochs: 2, and the run ends after 2 epochs"),
        (["--schedule.name", "step", "--schedule.decay_epochs", "[1, 30]"], "schedule.decay_epochs: 30 never come"),
        (["--augment.mixup", "0.2", "--augment.mix_off_epoch", "2"], "augment.mix_off_epoch: 2 never comes"),
        (["--loss.kd.start_epoch", "5"], "loss.kd.start_epoch: 5, and the run ends after 2 epochs: the term never counts"),
        (["--loss.kd.start_epoch", "1", "--loss.kd.stop_epoch", "1"], "loss.kd.stop_epoch: 1, and it starts at 1: the term"),
        (["--loss.ft.weight", "1"], "loss.ft.paraphraser_epochs: 30, and the run ends after 2 epochs: what follows"),
        (["--augment.repeats", "2", "--augment.plain_repeats", "1"], "plain_repeats: 1, but nothing alters the other views"),
        (["--augment.repeats", "256"], "augment.repeats: 256, and a batch has 64 views: it is of one image alone"),
        (
            ["--train.compile", "both", "--loss.cross_entropy.start_epoch", "1"],
            "loss.cross_entropy starts at epoch 1: what no term",
        ),
        (["--loss.kd.warmup_epochs", "5"], "loss.kd.warmup_epochs: 5, and the run ends after 2 epochs"),
        (["--loss.kd.final_weight", "0", "--loss.kd.decay_start_epoch", "3"], "final_weight has no effect"),
        (["--ema.enabled", "true", "--ema.warmup", "false"], "0.9999 over 12 steps leaves 100% of the initial weights"),
    ],
)
def test_what_comes_after_the_end_of_a_run_is_doubtful(options: list[str], words: str):
    asked = ["--train.epochs", "2", "--loss.kd.weight", "1"]
    assert list(doubts(parse(asked, LOSSES).recipe, LOSSES, 6)) == []
    assert list(doubts(parse([*asked, "--ema.enabled", "true"], LOSSES).recipe, LOSSES, 6)) == [], (
        "timm's average warms up by itself"
    )
    [doubt] = doubts(parse([*asked, *options], LOSSES).recipe, LOSSES, 6)
    assert words in doubt


def test_a_doubtful_run_is_made_and_says_what_is_doubtful(digits: Path, tmp_path: Path):
    same = tmp_path / "same"
    for split in ("train", "val"):
        shutil.copytree(digits / "train", same / split)
    asked = [*DIGITS, "--loss.kd.weight", "1", "--train.epochs", "1", "--schedule.warmup_epochs", "5"]
    job = finished(arguments(same, tmp_path / "run", *asked), tmp_path / "log")
    assert f"warning: {tmp_path / 'run'}: data.train and data.val are the same shards" in job.text()
    assert f"warning: {tmp_path / 'run'}: schedule.warmup_epochs: 5, and the run ends after 1 epochs" in job.text()
    assert (tmp_path / "run/summary.json").is_file()


@pytest.mark.parametrize("command", ["pipelines/imagenet.py", "pipelines/evaluate.py", "shards/prepare.py"])
def test_a_path_that_is_no_utf8_is_refused_in_one_line(command: str, tmp_path: Path):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    argv = [sys.executable, ROOT / command, "--out", place]
    done = subprocess.run(argv, capture_output=True, cwd=ROOT, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, check=False)
    assert done.returncode == 2
    assert (
        done.stderr.decode().splitlines()[-1].endswith("caf\\udce9: is no UTF-8; rename it, or give a link with another name")
    )
    assert list(tmp_path.iterdir()) == []


def test_models_with_attention_for_a_pool_are_measured_as_teacher_and_as_student(digits: Path, tmp_path: Path):
    small = "{depth: 1, embed_dim: 48, num_heads: 2, img_size: 32}"
    names = ("vit_base_patch16_siglip_224", "cait_xxs24_224")
    env = {"ACCELERATE_USE_CPU": "true"}
    for teacher, student in (names, names[::-1]):
        asked = [
            "--train.global_batch_size",
            "8",
            "--data",
            "memory",
            "--steps",
            "1",
            "--warm-up",
            "1",
            "--rounds",
            "1",
            "--json",
            str(tmp_path / "ledger.json"),
        ]
        models = ["--teacher", teacher, "--teacher.model_kwargs", small, "--student", student, "--student.model_kwargs", small]
        rest = ["--train", str(digits / "train"), "--val", str(digits / "val"), "--data.prepare", "none"]
        line = [sys.executable, ROOT / "pipelines/benchmark.py", *asked, *models, *rest, *DIGITS, "--loss.kd.weight", "1"]
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "ledger.json").is_file()
