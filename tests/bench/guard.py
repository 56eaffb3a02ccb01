"""The regression guard of `make bench`: ratios on a CPU against the recorded ones, and the name of what got worse.

    python -m tests.bench.guard [--record] [--only TEXT]

Every figure is a ratio of two things measured in turn on the same machine, by CPU time, smaller is better: each loss over its
straightforward version (time and memory), the step over its models alone, the data path over its reference and over the
webdataset package, and the reading of a local split over its reads and checks. What seems worse is measured again before it is
called so. `--record` measures everything several times and writes the medians, with tolerances that follow from their spread,
to tests/bench/ratios.json. `--only TEXT` measures what has TEXT in its name and leaves the records of all else as they are.
Exit codes: 0 nothing got worse, 1 something did, 2 the request was wrong.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from distill.command_line import Parser, command
from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.data.reader import SampleReader, check_bytes
from pipelines.measure.report import Report
from shards.prepare import main as prepare
from tests.bench.data import OURS
from tests.bench.losses import METHODS, Case, cases, measure, memory_ratio
from tests.bench.peer import make_teacher

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("ratios.json")
LEAST_TOLERANCE = 0.1
"""The smallest tolerance of a ratio, however little it varied when it was recorded."""
SPREADS = 2.0
"""Tolerance in multiples of the recorded spread."""
AGAIN = 2
"""More measurements of what seems worse."""
RECORDINGS = 5

PAIR = ("--teacher", "resnet18", "--student", "resnet10t", "--data.image_size", "64", "--train.global_batch_size", "64")
STEPS = {
    "cross-entropy alone": ("--teacher", "none", "--loss.sdd", "null", "--loss.msdcrd", "null"),
    "SD-DKD": ("--loss.msdcrd", "null", "--loss.sdd.base", "dkd"),
    "MSDCRD, last stage": ("--loss.sdd", "null", "--loss.msdcrd.stages", "last", "--loss.msdcrd.scales", "[1, 2]"),
}
PEERS = {"the reference loader": "ours, reference", "webdataset and PIL": "webdataset and PIL"}

Ratios = dict[str, float]


def loss_ratios(case: Case) -> Ratios:
    """Time and, where it can be told, memory of a loss over its straightforward version."""
    figures = measure(case, torch.device("cpu"), threads=1, budget=1.0)
    found = {f"{case.loss}: time": figures.ours_seconds / figures.reference_seconds}
    memory = memory_ratio(figures)
    return found if memory is None else {**found, f"{case.loss}: memory": memory}


def step_ratios(name: str, folder: Path) -> Ratios:
    """The step with these losses over its models alone."""
    file = folder / "ledger.json"
    photos, steps = folder / "photos", ("--data", "memory", "--clock", "cpu", "--steps", "6", "--rounds", "6")
    data = ("--train", str(photos / "train"), "--val", str(photos / "val"), "--data.prepare", "none")
    line = [sys.executable, str(ROOT / "pipelines" / "benchmark.py"), *PAIR, "--teacher-weights", str(folder / "teacher")]
    line += [*data, *STEPS[name], *steps, "--json", str(file)]
    run(line, folder)
    return {f"step, {name}: over its models": Report.read(file).ceiling.ratio}


def data_ratios(folder: Path) -> Ratios:
    """Core-seconds of an image through the data path, over those of its peers."""
    rates = {}
    for name in (OURS, *PEERS.values()):
        line = [sys.executable, "-m", "tests.bench.data", "speed", "--split", str(folder / "photos" / "train")]
        line += ["--seconds", "4", "--batch", "32", "--threads", "1", "--only", name]
        rates[name] = json.loads(run(line, folder).splitlines()[-1])["core"]
    return {f"data path: over {title}": rates[peer] / rates[OURS] for title, peer in PEERS.items()}


def reading_ratio(folder: Path, rounds: int = 9) -> Ratios:
    """CPU time of the reader of a local split over that of the reads and checks alone, which no reader can leave out."""
    index = ShardIndex.open(folder / "photos" / "train")
    reader, rows = SampleReader(index), [record.item()[:5] for record in index.records]
    files = [os.open(index.shard_path(shard), os.O_RDONLY) for shard in range(len(index.shards))]

    def bare() -> None:
        for offset, shard, size, _, crc32 in rows:
            check_bytes(os.pread(files[shard], size, offset), crc32)

    def ours() -> None:
        for sample in range(len(rows)):
            reader.read(sample)

    ratios = []
    for _ in range(rounds):
        seconds = []
        for work in (bare, ours):
            started = time.process_time()
            for _ in range(10):
                work()
            seconds.append(time.process_time() - started)
        ratios.append(seconds[1] / seconds[0])
    return {"local reading: over its reads and checks": statistics.median(ratios)}


def run(line: Sequence[str], folder: Path) -> str:
    """The output of a command of ours on one thread. Raises RuntimeError with its errors where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of {' '.join(line)}\n{done.stderr[-2000:]}")
    return done.stdout


def make_photos(folder: Path) -> None:
    """Shards of 4 x 96 pieces of the two photographs that come with scikit-learn, 400 pixels wide, in two classes."""
    for label, photo in enumerate(load_sample_images().images):
        for number in range(192):
            left, top = number * 5 % 240, number * 7 % 127
            for split, kept in (("train", number >= 32), ("val", number < 32)):
                if not kept:
                    continue
                path = folder / "images" / split / str(label) / f"{number:03d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                content = BytesIO()
                Image.fromarray(photo[top : top + 300, left : left + 400]).save(content, "JPEG", quality=90)
                path.write_bytes(content.getvalue())
    if prepare(["folder", "--source", str(folder / "images"), "--out", str(folder / "photos"), "--shards", "4"]):
        raise RuntimeError("the photographs could not be made into shards")


def measurements(folder: Path, only: str = "") -> list[Callable[[], Ratios]]:
    """Everything that is measured and has `only` in its name, piece by piece. RecipeError where nothing has."""
    # the papers' two and what they are made of: with all methods a pass would take twice the time
    losses = {case.loss: lambda case=case: loss_ratios(case) for case in cases(quick=True) if case.loss not in METHODS}
    steps = {f"step, {name}": lambda name=name: step_ratios(name, folder) for name in STEPS}
    pieces: dict[str, Callable[[], Ratios]] = {**losses, **steps, "data path": lambda: data_ratios(folder)}
    pieces["local reading"] = lambda: reading_ratio(folder)
    chosen = [piece for name, piece in pieces.items() if only in name]
    if not chosen:
        raise RecipeError(f"--only {only}: nothing has this in its name; there are {', '.join(pieces)}")
    return chosen


def record(pieces: Sequence[Callable[[], Ratios]]) -> dict[str, Any]:
    """Medians and tolerances of several passes."""
    found: dict[str, list[float]] = {}
    for number in range(RECORDINGS):
        for piece in pieces:
            for name, ratio in piece().items():
                found.setdefault(name, []).append(ratio)
                print(f"{number + 1} of {RECORDINGS}: {name} {ratio:.3f}", flush=True)
    ratios = {}
    for name, values in found.items():
        median = statistics.median(values)
        spread = (max(values) - min(values)) / median
        ratios[name] = {
            "ratio": round(median, 4),
            "tolerance": round(max(LEAST_TOLERANCE, SPREADS * spread), 2),
            "seen": values,
        }
    return ratios


def worse(found: Ratios, recorded: dict[str, Any]) -> list[str]:
    """Names of what exceeds its recorded ratio by more than its tolerance."""
    return [n for n, ratio in found.items() if n in recorded and ratio > recorded[n]["ratio"] * (1 + recorded[n]["tolerance"])]


def compare(pieces: Sequence[Callable[[], Ratios]], recorded: dict[str, Any]) -> tuple[Ratios, list[str]]:
    """Every ratio, the best of what was measured again, and the names of those that stay worse; prints each as it is known."""
    everything: Ratios = {}
    for piece in pieces:
        found = piece()
        for _ in range(AGAIN):
            if not worse(found, recorded):
                break
            found = {name: min(ratio, found[name]) for name, ratio in piece().items()}
        bad = worse(found, recorded)
        for name, ratio in found.items():
            known = recorded.get(name)
            told = f"recorded {known['ratio']:.3f}, up to {1 + known['tolerance']:.2f}x" if known else "not recorded"
            print(f"{name:45s} {ratio:7.3f}   {told}{'   WORSE' if name in bad else ''}", flush=True)
        everything |= found
    return everything, worse(everything, recorded)


@command
def main(argv: Sequence[str]) -> int:
    """1 where something got worse."""
    parser = Parser(description=__doc__ or "")
    parser.add_argument("--record", action="store_true", help=f"measure {RECORDINGS} times and write the file")
    parser.add_argument("--only", default="", metavar="TEXT", help="measure what has this in its name, such as 'data path'")
    parser.add_argument("--file", type=Path, default=RECORDED, help="the recorded ratios (%(default)s)")
    asked = parser.parse_args(argv)
    if not asked.record and not asked.file.is_file():
        raise RecipeError(f"--file {asked.file}: no such file; --record makes it")
    measurements(Path(), asked.only)  # raises for a name of nothing, before anything is prepared
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        make_photos(Path(name))
        make_teacher("resnet18", ("0", "1"), 64, Path(name) / "teacher")
        recorded = json.loads(asked.file.read_text())["ratios"] if asked.file.is_file() else {}
        pieces = measurements(Path(name), asked.only)
        if asked.record:
            kept = recorded if asked.only else {}
            written = {"torch": torch.__version__, "recordings": RECORDINGS, "ratios": {**kept, **record(pieces)}}
            asked.file.write_text(json.dumps(written, indent=1) + "\n")
            return 0
        found, bad = compare(pieces, recorded)
    print("worse than recorded: " + ", ".join(bad) if bad else f"nothing of {len(found)} ratios is worse than recorded")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
