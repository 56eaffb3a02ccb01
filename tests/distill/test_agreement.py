"""What processes agree on between two steps, by real ones."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from torch import distributed

from distill.agreement import Control
from tests.processes import CONTEXT


def agree_alone(rank: int, store: str, said: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    control = Control(timedelta(seconds=2))
    if rank == 1:
        time.sleep(3600)  # it hangs; a dead one would close its connection
    try:
        control.agree()
    except RuntimeError as error:
        Path(said).write_text(str(error))
    os._exit(0)


def test_an_agreement_that_one_process_never_joins_ends_after_the_time_that_was_asked_for(tmp_path: Path):
    """It was gloo's half hour, whatever the recipe said."""
    said = tmp_path / "said"
    ranks = [CONTEXT.Process(target=agree_alone, args=(r, str(tmp_path / "store"), str(said))) for r in range(2)]
    for rank in ranks:
        rank.start()
    ranks[0].join(120)
    for rank in ranks:
        rank.kill()
    assert "2000ms" in said.read_text() or "imed out" in said.read_text()


def test_under_nohup_a_run_outlives_its_terminal():
    script = (
        "import os, signal; from distill.agreement import Control; control = Control().listen();"
        " os.kill(os.getpid(), signal.SIGHUP); print(control.received)"
    )
    for before, noted in ((["nohup"], "False"), ([], "True")):
        done = subprocess.run([*before, sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (0, noted), done.stderr
