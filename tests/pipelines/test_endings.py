"""How a command's process ends: with the code that was meant, and with nothing of its run still at work."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.agreement import Control
from distill.watchdog import Watchdog
from pipelines.imagenet import closed
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import build_accelerator
from tests.runs import recipe_of

ROOT = Path(__file__).parents[2]
CODE = """
import atexit, os, sys
from torch import distributed
from pipelines.setup.launcher import exit_with

def main():
    if sys.argv[1] == "group":
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    print("said")
    if sys.argv[2] == "raise":
        raise ValueError("what went wrong")
    return int(sys.argv[2])

atexit.register(os.abort)  # as a destructor of NCCL's does
exit_with(main)
"""


@pytest.mark.parametrize(("ends", "code"), [("0", 0), ("2", 2), ("75", 75), ("raise", 1)])
def test_what_is_left_of_a_process_group_does_not_change_the_exit_code(ends: str, code: int):
    done = subprocess.run([sys.executable, "-c", CODE, "group", ends], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout == "said\n"
    assert ("ValueError: what went wrong" in done.stderr) is (ends == "raise")


def test_a_process_without_a_group_ends_as_python_does():
    done = subprocess.run([sys.executable, "-c", CODE, "alone", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -6, "what was registered for the end is called"


def test_a_run_that_fails_leaves_no_loader_at_work(digits: Path, tmp_path: Path, fresh_accelerate: None):
    recipe = recipe_of(digits, tmp_path)
    accelerator = build_accelerator(recipe)
    run, _ = build(recipe, accelerator, build_splits(recipe, accelerator), Control())
    batches = run.train_loader.epoch(0)
    next(batches)
    with pytest.raises(RuntimeError, match="a step failed"), closed(run, Watchdog(0, 1, 60)):
        raise RuntimeError("a step failed")
    for loader in (run.train_loader, run.eval_loader):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            next(loader.epoch(1))
