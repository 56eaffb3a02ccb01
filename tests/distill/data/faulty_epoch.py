"""An epoch on two processes over images with every kind of fault mixed in: no step is lost, exactly the faults are reported.

    python -m tests.distill.data.faulty_epoch --images FOLDER --count 4000

FOLDER has CLASS/NAME.jpg; 1 % of `count` are bad in each of the ways of `planting.py`, another 1 % odd in each way. Starts the
real launcher (torchrun). Prints one line per kind.
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from distill.command_line import Parser, command
from tests.distill.data.planting import planted_split, raw_split

ROOT = Path(__file__).resolve().parents[3]
BATCH = 50
VAL_IMAGES = 75


def originals(images: Path) -> tuple[list[bytes], list[int], list[str]]:
    """JPEG bytes, labels and class names of CLASS/NAME.jpg below `images`."""
    paths = sorted(path for path in images.glob("*/*") if path.suffix.lower() in (".jpg", ".jpeg"))
    names = sorted({path.parent.name for path in paths})
    return [path.read_bytes() for path in paths], [names.index(path.parent.name) for path in paths], names


def plant(images: Path, folder: Path, count: int, share: float = 0.01) -> dict[str, str]:
    """`folder/train` with faults and `folder/val` without; the kind of each planted fault by its key."""
    if count % BATCH:
        raise ValueError(f"{count} images: a multiple of {BATCH}, so that an epoch visits each")
    data, labels, names = originals(images)
    bad = planted_split(folder / "train", data, labels, names, count, share)
    raw_split(folder / "val", data[:VAL_IMAGES], 1, labels[:VAL_IMAGES], names)
    return bad


def request(folder: Path, out: Path, *more: str) -> list[str]:
    """What `pipelines/imagenet.py` is asked: one epoch of a small student alone at its own 32 pixels."""
    return [
        *("--train", str(folder / "train"), "--val", str(folder / "val"), "--out", str(out), "--data.prepare", "none"),
        *("--recipe", str(ROOT / "pipelines/recipes/digits/baseline.yaml"), "--augment.crop", "random_resized"),
        *("--train.epochs", "1", "--train.global_batch_size", str(BATCH), "--report.log_every", "1"),
        *("--report.page", "false"),
        *("--data.max_bad_rate", "0.2", "--optim.learning_rate", "0.01", *more),
    ]


def reported(out: Path) -> list[dict]:
    """The lines of all ranks' fault reports."""
    return [json.loads(line) for path in sorted(out.glob("faults-rank*.jsonl")) for line in path.read_text().splitlines()]


def check(out: Path, bad: dict[str, str], count: int) -> None:
    """Raises AssertionError unless every step was made, and the planted faults and no others were reported."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss/total" in line] == list(range(1, count // BATCH + 1))
    assert metrics[-1]["eval/images"] == VAL_IMAGES
    lines = reported(out)
    assert {line["key"] for line in lines} == set(bad)
    own = [(line["rank"], line["key"]) for line in lines]
    assert len(own) == len(set(own)), "a sample was reported twice by one process"
    assert all(line["reason"] and line["shard"].startswith("train-") and line["offset"] > 0 for line in lines)
    steps = [line for line in metrics if "loss/total" in line]
    assert steps[-1]["bad_samples"] == len(bad)
    assert json.loads((out / "summary.json").read_text())["bad_samples"] == len(bad)


@command
def main(argv: Sequence[str]) -> None:
    """Trains one epoch and prints what was found of each kind of fault."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=4000)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "run"
        bad = plant(options.images, folder, options.count)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        started = time.monotonic()
        line = [*launcher, "pipelines/imagenet.py", *request(folder, out)]
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        check(out, bad, options.count)
        reasons = {line["key"]: line["reason"] for line in reported(out)}
        for kind, number in collections.Counter(bad.values()).items():
            example = next(reasons[key] for key in bad if bad[key] == kind)
            print(f"{number:4d} {kind:26s} {example[:70]}")
        told = f"{options.count} images on 2 processes, {options.count // BATCH} of {options.count // BATCH} steps"
        print(f"{told}: {len(bad)} faults planted, the same {len(bad)} reported, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
