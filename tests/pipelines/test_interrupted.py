"""Ctrl-C in every command: one line, exit code 130, no traceback, and no process is left. Runs save first: see test_run.py."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.processes import CONTEXT, finished
from tests.runs import arguments

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [*sorted((ROOT / "pipelines").glob("[a-z]*.py")), ROOT / "shards/prepare.py"]


def _enter(script: str, argv: Sequence[str], at: str, log: str) -> None:
    """Executes a script as its command line would; Ctrl-C comes, as from a terminal, while the function `at` works."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [script, *argv]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    threading.Thread(target=_interrupt, args=(at,), daemon=True).start()
    runpy.run_path(script, run_name="__main__")


def _interrupt(at: str) -> None:
    main = threading.main_thread().ident
    while True:
        frame = sys._current_frames().get(main)
        while frame is not None and frame.f_code.co_name != at:
            frame = frame.f_back
        if frame is not None:
            os.killpg(0, signal.SIGINT)
            return
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step."""
    folder = tmp_path_factory.mktemp("interrupted")
    finished(arguments(digits, folder / "run", "--train.max_steps", "1"), folder / "log")
    return folder / "run"


PLACES = {
    "benchmark": "warm_up",
    "compare": "read",
    "doctor": "run_child",
    "evaluate": "evaluate",
    "export": "export_onnx",
    "pairs": "explain",
    "prepare": "as_completed",
    "report": "write",
    "reproduce": "listing",
    "scale": "read",
}
"""Command -> the function in which it is interrupted. `compare_methods` and the other requests to `reproduce` start runs, and
pass the signal on to them."""


def words(name: str, run: Path, digits: Path, out: Path) -> list[str]:
    """A request that a command has work with."""
    # a read of a pipe waits: the work itself takes milliseconds
    if name == "scale":
        os.mkfifo(out / "ledger.json")
    if name == "compare":
        shutil.copytree(run, out / "run")
        (out / "run" / "metrics.jsonl").unlink()
        os.mkfifo(out / "run" / "metrics.jsonl")
    images = ["--source", str(digits / "images"), "--out", str(out / "shards"), "--workers", "2", "--shards", "40"]
    return {
        "benchmark": arguments(digits, out / "run"),
        "compare": [str(out / "run")],
        "doctor": ["--only", "versions", "--out", str(out)],
        "evaluate": ["--model", "cifar_resnet8", "--weights", str(run / "student"), "--val", str(digits / "val")],
        "export": [str(run), "--out", str(out / "student.onnx")],
        "pairs": ["explain", "cifar_resnet14", "cifar_resnet8"],
        "prepare": ["folder", *images],
        "report": [str(run), "--out", str(out / "report.html")],
        "reproduce": ["list"],
        "scale": ["--ledger", str(out / "ledger.json")],
    }[name]


def script_of(name: str) -> Path:
    return next(path for path in COMMANDS if path.stem == name)


def alive(group: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = [process.pid for process in psutil.process_iter(["status"]) if process.info["status"] != psutil.STATUS_ZOMBIE]
    return [pid for pid in found if psutil.pid_exists(pid) and os.getsid(pid) == group]


@pytest.mark.parametrize("name", PLACES)
def test_a_command_that_is_interrupted_at_work_says_one_line_and_leaves_no_process(
    name: str, run: Path, digits: Path, tmp_path: Path
):
    log = tmp_path / "log"
    asked = (str(script_of(name)), words(name, run, digits, tmp_path), PLACES[name], str(log))
    process = CONTEXT.Process(target=_enter, args=asked)
    process.start()
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    text = log.read_text()
    assert text.splitlines()[-1] == "interrupted"
    assert "Traceback" not in text
    assert "Exception" not in text
    assert alive(process.pid) == []


@pytest.mark.parametrize("name", ["compare", "evaluate", "prepare"])
def test_a_command_that_is_interrupted_while_it_is_imported_says_the_same_line(name: str, tmp_path: Path):
    """A traceback of the library that was being loaded used to be printed."""
    command = [sys.executable, str(script_of(name)), "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while "_multiarray_umath" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert (process.returncode, text) == (130, "interrupted\n")


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.stem)
def test_every_command_takes_ctrl_c_before_it_imports_what_is_slow(script: Path):
    lines = ast.parse(script.read_text()).body
    begins = next(at for at, line in enumerate(lines) if "end_at_interrupt()" in ast.unparse(line))
    light = {"distill.children", "pipelines.setup.launcher"}
    for line in lines[:begins]:
        if isinstance(line, (ast.Import, ast.ImportFrom)):
            names = [line.module or ""] if isinstance(line, ast.ImportFrom) else [alias.name for alias in line.names]
            assert all(name in light or name.split(".")[0] in sys.stdlib_module_names for name in names), names
