"""Preparations killed (-9) at random moments and started again end with the bytes of one that nobody touched.

    python -m tests.shards.kills --kills 20 --images 2000 --seed 0

Each preparation has a folder of its own and is killed once, anywhere between its start and its end: the command with all its
workers, or the command alone, whose workers then have to end by themselves. Prints one line per kill.
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
from distill.files import file_sha256
from tests.shards.preparing import ROOT, image_bytes

SHARDS = 40


def start(images: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    line = [sys.executable, str(ROOT / "shards/prepare.py"), "folder", "--source", str(images), "--out", str(out)]
    line += ["--shards", str(SHARDS), "--workers", str(workers)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True)


def finish(images: Path, out: Path, workers: int) -> float:
    """Prepares to the end; the seconds it took."""
    begin, process = time.monotonic(), start(images, out, workers)
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()
    return time.monotonic() - begin


def strike(process: subprocess.Popen[bytes], everyone: bool) -> None:
    """Kills the command, and its workers unless they are to end by themselves; returns when all are gone."""
    try:
        workers = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        workers = []
    if everyone:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, f"orphans: {alive}"


def contents(out: Path) -> dict[str, str]:
    """The sha256 of every file, the manifest included; `_info.json` names the folder and is left out."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "_info.json")
    return {str(path.relative_to(out)): file_sha256(path) for path in files}


@command
def main(argv: Sequence[str]) -> None:
    """Kills and starts again until it was done often enough."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        images, whole = Path(name) / "images", Path(name) / "whole"
        for number in range(options.images):
            path = images / ("a", "b")[number % 2] / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes(number, (150, 150)))
        life = finish(images, whole, 2)
        expected = contents(whole)
        print(f"uninterrupted: {options.images} images in {SHARDS} shards, {life:.1f} s", flush=True)
        kills = 0
        while kills < options.kills:
            out, workers, everyone = Path(name) / "killed", dice.choice((1, 2)), dice.random() < 0.5
            shutil.rmtree(out, ignore_errors=True)
            process = start(images, out, workers)
            moment = dice.uniform(0, life)
            time.sleep(moment)
            if process.poll() is not None:  # it was faster than the one that was timed
                continue
            strike(process, everyone)
            kills += 1
            done = len(list(out.glob(".parts/*.json")))
            finish(images, out, dice.choice((1, 2)))
            assert contents(out) == expected, f"{out} differs"
            who = "all processes" if everyone else "the command"
            told = f"{who} killed after {moment:.2f} s, {workers} workers; {done} of {SHARDS} shards had their markers"
            print(f"  {kills}: {told}; identical", flush=True)
    print(f"{kills} kills: every file byte-identical every time")


if __name__ == "__main__":
    sys.exit(main())
