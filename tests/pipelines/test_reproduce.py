"""The papers' tables by real processes: one cell of digits from nothing to its line, interrupted and resumed once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.reproduce import main
from pipelines.tables.cells import cells, named
from pipelines.tables.report import hardware
from pipelines.tables.runs import trainable

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
CELL = "own/digits/cifar_resnet14/cifar_resnet8/kd"


def started(digits: Path, out: Path) -> subprocess.Popen:
    line = [sys.executable, str(ROOT / "pipelines" / "reproduce.py"), "--out", str(out), "run", CELL, "--data", str(digits)]
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_one_cell_goes_from_nothing_to_its_line_and_was_stopped_on_the_way(digits: Path, tmp_path: Path):
    out = tmp_path / "out"
    teacher = out / "digits" / "alone" / "cifar_resnet14" / "seed0"
    student = out / "digits" / "cifar_resnet14--cifar_resnet8" / "kd" / "seed0"
    first = started(digits, out)
    while not (student / "manifest.json").is_file():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 75
    assert "the same command goes on" in told
    before = (teacher / "summary.json").stat().st_mtime_ns
    second = started(digits, out)
    told, errors = second.communicate(timeout=300)
    assert second.returncode == 0, errors
    assert (teacher / "summary.json").stat().st_mtime_ns == before, "the teacher was trained twice"
    assert json.loads((student / "manifest.json").read_text())["recipe"]["teacher"]["weights"] == str(teacher / "student")

    assert main(["--out", str(out), "table", "own/digits"]) == 0
    lines = {line["method"]: line for line in csv.DictReader((out / "own-digits.csv").open(newline=""))}
    measured = json.loads((student / "summary.json").read_text())["top1"]
    assert lines["kd"]["ours"] == f"{measured:.2f}"
    assert lines["kd"]["seeds"] == "1"
    assert lines["kd"]["hardware"]
    assert lines["teacher"]["ours"] != "not run", "the teacher's own cell has its run too"
    assert lines["baseline"]["ours"] == "not run"
    assert "| baseline | top1 |  | not run |" in (out / "own-digits.md").read_text()


def test_the_list_has_every_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--out", str(tmp_path), "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(cells())} cells"
    assert main(["--out", str(tmp_path), "list", "--table", "sdd/T1", "--method", "sdd_*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "12 cells"
    assert all(line.split()[2] == "not" for line in lines[2:-2])


def test_the_folder_of_runs_may_be_named_before_the_command_and_behind_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--out", str(tmp_path / "a"), "table", "own/digits/"]) == 0
    assert main(["table", "own/digits", "--out", str(tmp_path / "b")]) == 0
    written = [sorted(path.name for path in folder.iterdir()) for folder in (tmp_path / "a", tmp_path / "b")]
    assert written == [["own-digits.csv", "own-digits.md"]] * 2
    capsys.readouterr()


def test_a_plan_counts_runs_once_and_knows_hours_only_of_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--out", str(tmp_path), "plan", "own/digits", "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[2:5]] == [
        ["none", "cifar_resnet14", "1", "0.0"],
        ["none", "cifar_resnet8", "2", "0.0"],
        ["cifar_resnet14", "cifar_resnet8", "2", "0.0"],
    ]
    assert lines[-1].startswith("5 runs, 0.0 million images, unknown hours")
    assert main(["--out", str(tmp_path), "plan", "sdd/T3/resnet34.tv_in1k/resnet18/sdd_dkd", "--seeds", "1"]) == 0
    assert "1 runs, 128.1 million images, 7.7 hours on h200" in capsys.readouterr().out


def test_what_no_run_measures_is_not_planned_and_the_table_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--out", str(tmp_path), "plan", "sdd/T9"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 runs")
    assert main(["--out", str(tmp_path), "table", "sdd/T9"]) == 0
    lines = list(csv.DictReader((tmp_path / "sdd-T9.csv").open(newline="")))
    assert [line["remarks"].endswith("no run measures it") for line in lines] == [True] * 4
    capsys.readouterr()


def test_a_table_is_run_without_the_cells_that_no_run_measures(capsys: pytest.CaptureFixture[str]):
    found = trainable(named("simkd_readme") + named("sdd/T9"))
    assert found == named("simkd_readme")
    assert capsys.readouterr().out.splitlines() == [f"left out: {cell.name}: no run measures it" for cell in named("sdd/T9")]


def test_hardware_counts_the_devices():
    assert hardware({"world_size": 1, "device": "x86_64"}) == "x86_64"
    assert hardware({"world_size": 8, "device": "NVIDIA H200"}) == "8 x NVIDIA H200"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["show", "sdd/T1/cifar_resnet32x4/cifar_resnet8x4"], "no such cell or table; did you mean sdd/"),
        (["show", "sdd/T1"], "52 cells begin so; take one, such as sdd/T1/"),
        (["show", "msdcrd_v1/T9"], "no such cell or table"),
        (["list", "--method", "nope"], "list: no cell has --table *, --method nope and --pair *; `list` alone shows all"),
        (["run", CELL, "--seeds", "0"], "--seeds 0: one at least"),
        (["run", CELL, "--launch", "no-such-launcher --all"], "--launch no-such-launcher --all: no such program"),
        (["run", CELL, "--launch", ""], "--launch '': no such program"),
        (["run", CELL, "--launch", "torchrun 'a"], "--launch torchrun 'a: No closing quotation"),
        (["run", "sdd/T9"], "none of the 4 cells can be run; sdd/T9/cifar_resnet32x4/cifar_resnet8x4/crd/milliseconds: no run"),
        (["plan", "sdd/T3", "--machine", "laptop"], "ledger.csv has no rates of it, but of h200"),
    ],
)
def test_a_wrong_request_gets_one_line_and_exit_code_2(
    wrong: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--out", str(tmp_path), *wrong]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
