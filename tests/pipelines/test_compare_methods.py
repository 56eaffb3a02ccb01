"""The comparison of methods by real processes: one teacher, one table, no run twice, and a plain word where one is worse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.losses import LOSSES
from pipelines.compare_methods import ROWS, Row, chosen_rows, main, recipes, report
from pipelines.setup.arguments import parse
from tests.runs import DOT, arguments

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
OWN_LOSS = ROOT / "tests" / "distill" / "losses" / "everything.py"
SOME = """
kd:
  kd: {weight: 1.0}
everything:
  everything: {weight: 1.0}
tiny_cells:
  wkd_feature: {weight: 1.0, grid: 8}
too_heavy:
  cross_entropy: {weight: 1.0}
  kd: {weight: 1.0e+38}
"""
"""A method that trains, one of a file of the user's, one that cannot serve the pair, and one whose loss is not finite."""


def started(digits: Path, out: Path, *more: str) -> subprocess.Popen:
    """The real command, over a teacher that is trained first."""
    rows = out.with_suffix(".rows.yaml")
    rows.write_text(SOME)
    line = [sys.executable, str(ROOT / "pipelines" / "compare_methods.py"), *arguments(digits, out)]
    line += ["--teacher-weights", "train", "--train.epochs", "1", "--rows", str(rows), "--import", str(OWN_LOSS), *more]
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_command_trains_the_teacher_once_and_every_method_and_goes_on_where_it_was_stopped(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    stopped = started(digits, out, "--seeds", "1", "--seed", "1")
    while not (out / "alone" / "seed1" / "manifest.json").is_file():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    told, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 75
    assert "the same command goes on" in told
    before = (out / "teacher" / "summary.json").stat().st_mtime_ns
    again = started(digits, out, "--seeds", "1", "--seed", "1")
    told, errors = again.communicate(timeout=300)
    assert again.returncode == 1, errors  # one method failed, and the others are there
    assert (out / "teacher" / "summary.json").stat().st_mtime_ns == before
    table = (out / "methods.md").read_text()
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names == ["method", "---", "alone", "kd", "everything"]
    assert "* tiny_cells: refused: loss.wkd_feature: grid 8 has cells of one pixel" in table
    assert "* too_heavy: failed with exit code 1: " in table
    manifests = [json.loads((out / name / "seed1" / "manifest.json").read_text()) for name in ("alone", "kd")]
    assert [each["recipe"]["seed"] for each in manifests] == [1, 1]
    assert manifests[1]["recipe"]["teacher"]["weights"] == str(out / "teacher" / "student")
    assert manifests[0]["teacher"] is None


def test_every_loss_of_the_table_is_in_a_row_and_every_row_is_a_recipe(tmp_path: Path):
    rows = chosen_rows(ROWS, "")
    base = parse(["--out", str(tmp_path)], LOSSES).recipe
    found = recipes(base, rows, 3)
    alike = {name for name, loss in LOSSES.items() if not loss.reads_plain}
    assert {loss for recipe in found.values() for loss in recipe.loss} == alike, "rows differ in nothing but their losses"
    assert {recipe.seed for recipe in found.values()} == {3}
    assert list(found) == ["alone", *rows]


def test_methods_are_compared_under_dot_and_the_student_alone_under_sgd(tmp_path: Path):
    """DOT without a distillation is SGD, and is refused: whoever asks for it would expect more."""
    found = recipes(parse(["--out", str(tmp_path), *DOT], LOSSES).recipe, chosen_rows(ROWS, "kd,crd"), 0)
    assert [each.optim.name for each in found.values()] == ["sgd", "dot", "dot"]
    assert found["alone"].optim.options == {}
    assert found["kd"].optim.options == {"delta": 0.09}


def summary(top1: float, student: int = 10, loss: int = 0) -> dict:
    return {"top1": top1, "seconds": 2.0, "student_parameters": student, "loss_parameters": loss}


def test_the_table_says_where_a_method_is_worse_than_none():
    alone = Row("alone", {0: summary(50), 1: summary(60)})
    worse = Row("worse", {0: summary(40), 1: summary(50.5)})
    unclear = Row("unclear", {0: summary(48, student=13, loss=4), 1: summary(63)})
    lines = report([alone, worse, unclear, Row("missing", {}, "refused: no map")]).splitlines()
    assert lines[2:5] == [
        "| alone | 55.00 | 7.07 | 2 | - | - | 2 |",
        "| worse | 45.25 | 7.42 | 2 | -9.75 ± 0.25 | 0 | 2 |",
        "| unclear | 55.50 | 10.61 | 2 | +0.50 ± 2.50 | 7 | 2 |",
    ]
    assert lines[-5:] == [
        "* Better than the student alone: no method.",
        "* Worse than the student alone: worse.",
        "* Not told apart from it (less than two standard errors of the difference), better on average: unclear.",
        "* Not told apart from it, worse on average: no method.",
        "* missing: refused: no map",
    ]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--loss.kd.weight", "2"], "--loss.kd.weight: losses and weights are rows of"),
        (["--methods", "kd,pk"], "--methods pk: no row of"),
        (["--seeds", "0"], "--seeds 0: one at least"),
        (["--rows", "nothing.yaml"], "--rows nothing.yaml: no such file"),
        (["--train.epoch", "3"], "--train.epoch: unknown option, did you mean --train.epochs?"),
        (["--recipe", str(ROOT / "pipelines/recipes/digits/baseline.yaml")], "name the teacher of all methods with --teacher"),
    ],
)
def test_a_wrong_request_gets_one_line_and_exit_code_2(wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(wrong) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
