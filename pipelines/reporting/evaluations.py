"""Dumps that are missing, written by `pipelines/evaluate.py` in processes of their own: one that fails takes nobody with it."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from distill.children import last_error, run_child
from pipelines.reporting.runs import Comparison
from pipelines.setup.launcher import STARTED_BY_US

EVALUATE = Path(__file__).parents[1] / "evaluate.py"
OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_", "MASTER_", "TORCHELASTIC_")
"""How the variables begin that would make the child one of this run's processes."""


def write_dumps(comparison: Comparison, seconds: float = 24 * 3600) -> list[str]:
    """Writes the dumps that the comparison lacks, and gives a line for each that could not be. seconds: for all together."""
    end, problems = time.monotonic() + seconds, []
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCH)}
    for file, options in comparison.missing_dumps().items():
        left = max(0.0, end - time.monotonic())
        code, _, errors = run_child([sys.executable, str(EVALUATE), *options], left, {**environment, STARTED_BY_US: "1"})
        if code:
            why = f"it takes more than {seconds:.0f} s" if time.monotonic() > end else last_error(errors) or f"exit code {code}"
            problems.append(f"{file} is not written: {why}")
    return problems
