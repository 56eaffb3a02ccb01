"""`make chaos`: a small distillation on two processes, killed at random moments and restarted, ends as if nothing had been.

    python -m tests.chaos --kills 20 --seed 0

Starts the real launcher (torchrun). Each life ends by `kill -9` of a rank or of the launcher, or by SIGTERM; the last one is
left alone. Then weights, optimiser state and metrics are compared with those of a run that nobody touched.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from distill.command_line import Parser, command
from shards.prepare import prepare_digits
from tests.runs import EVERYTHING, arguments, assert_same_run, steps_of

ROOT = Path(__file__).parent.parent
STEPS = 120
"""Two epochs of the digits in steps of 24 images."""


def launch(argv: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pipelines/imagenet.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        return subprocess.Popen([*command, *argv], cwd=ROOT, stdout=file, stderr=file, env=environment)


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The worker processes, by rank; empty while the launcher is still importing."""
    try:
        children = psutil.Process(launcher.pid).children()
        return sorted((c for c in children if "pipelines/imagenet.py" in c.cmdline()), key=lambda c: c.pid)
    except psutil.NoSuchProcess:
        return []


def strike(launcher: subprocess.Popen, dice: random.Random) -> str:
    """Ends this life in one of four ways; what was done, in words."""
    workers = ranks_of(launcher)
    victims = [("launcher", psutil.Process(launcher.pid)), *((f"rank {i}", w) for i, w in enumerate(workers))]
    name, victim = dice.choice(victims)
    number = dice.choice([signal.SIGKILL, signal.SIGTERM])
    victim.send_signal(number)
    return f"{number.name} to {name}"


def gone(processes: list[psutil.Process], launcher: subprocess.Popen) -> None:
    """Waits until nothing of a life is left; what does not end by itself within a minute is a failure."""
    launcher.wait(90)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, f"orphans: {alive}"


def steps_done(out: Path) -> int:
    return len(steps_of(out)) if (out / "metrics.jsonl").is_file() else 0


def wait_for_a_moment(launcher: subprocess.Popen, out: Path, dice: random.Random, life: float) -> None:
    """Most lives end a few steps after the last one (so that the work lasts for all kills), some while they start, wherever
    they are then."""
    goal = steps_done(out) + dice.randint(1, 4)
    end = time.monotonic() + (dice.uniform(0, 0.5) * life if dice.random() < 0.25 else 20 * life)
    while launcher.poll() is None and time.monotonic() < end and steps_done(out) < goal:
        time.sleep(0.02)
    time.sleep(dice.uniform(0, 0.3))


def chaos(folder: Path, kills: int, seed: int) -> None:
    """Runs it and prints one line per life; raises AssertionError where anything was lost."""
    dice, data = random.Random(seed), folder / "data"
    prepare_digits(data)
    straight, killed, log = folder / "straight", folder / "killed", folder / "log"
    more = [*EVERYTHING, "--train.epochs", "2"]
    begin = time.monotonic()
    code = launch(arguments(data, straight, *more), log).wait()
    assert code == 0, log.read_text()
    life = time.monotonic() - begin
    print(f"uninterrupted: {steps_done(straight)} steps in {life:.0f} s", flush=True)
    command, done = arguments(data, killed, *more, "--resume"), 0
    while done < kills and not (killed / "summary.json").is_file():
        launcher = launch(command, log)
        wait_for_a_moment(launcher, killed, dice, life)
        if launcher.poll() is None:
            workers = ranks_of(launcher)
            what = strike(launcher, dice)
            done += 1
            gone(workers, launcher)
            print(f"  {done}: {what}; {steps_done(killed)} of {STEPS} steps are in the log", flush=True)
    assert done == kills, f"the work was done after {done} kills"
    code = launch(command, log).wait()
    assert code == 0, log.read_text()
    assert_same_run(straight, killed)
    resumes = log.read_text().count("going on from step")
    print(
        f"kills: {done}, resumes: {resumes}, lost steps: {STEPS - steps_done(killed)}; weights, optimiser and metrics identical"
    )


@command
def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos(folder, options.kills, options.seed)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
