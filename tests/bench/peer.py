"""Whole runs of this project and of timm's own train.py on the same shards, pair, precision and batch, in turn.

    python tests/bench/peer.py --timm-train train.py --shards DIR

train.py is not in timm's wheel: take it from the repository of the installed release (huggingface/pytorch-image-models). Each
side distils by plain KD plus cross-entropy with random-resized crops and flips, from one random teacher that both read from the
same folder, on the same number of worker threads (timm: processes) and compute threads, and evaluates once, at its end.

Both sides run twice a turn, short and long. Whole run: images of the long run over all of its seconds, from the start of the
process to its end. Steady: the images that the long run has more, over the seconds that it takes more. Seconds are of this
process's clock, and, for machines that others use too, core-seconds: user and system time of a run and all its children.

With --cache-views a third side is ours with a teacher cache, which is made once, before the turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import timm
import torch

import distill.models  # noqa: F401 (registers the CIFAR architectures)
from distill.command_line import Parser, command, requests
from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.models.build import create_teacher
from distill.models.export import export_student
from distill.text_table import table

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURE, LEARNING_RATE, MOMENTUM, DECAY = 4.0, 0.01, 0.9, 1e-4
RECIPE = f"""
augment: {{crop: random_resized, flip: 0.5}}
data: {{interpolation: bilinear}}
teacher: {{evaluate: false}}
loss:
  cross_entropy: {{weight: 1.0}}
  kd: {{weight: 1.0, temperature: {TEMPERATURE}}}
optim: {{name: sgd, learning_rate: {LEARNING_RATE}, momentum: {MOMENTUM}, weight_decay: {DECAY}}}
schedule: {{name: constant}}
report: {{trackers: [], page: false}}
"""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one run."""

    wall: float
    core: float


@dataclass(frozen=True)
class Times:
    """A short and a long run of one side, and their images."""

    short: Seconds
    long: Seconds
    images_short: int
    images_long: int

    def whole(self, clock: str) -> float:
        """Images per second of the long run, start and end included."""
        return self.images_long / getattr(self.long, clock)

    def steady(self, clock: str) -> float:
        """Images per second between the lengths of both runs."""
        return (self.images_long - self.images_short) / (getattr(self.long, clock) - getattr(self.short, clock))


def make_teacher(name: str, class_names: Sequence[str], side: int, folder: Path) -> None:
    """Random weights as a folder that both sides load; its config names the side of the images that it sees."""
    backbone = create_teacher(name, weights="random", num_classes=len(class_names))
    spec = replace(backbone.input_spec, height=side, width=side)
    export_student(backbone.model, folder, input_spec=spec, class_names=list(class_names), metadata={})


def ours(asked: argparse.Namespace, teacher: Path, epochs: int, out: Path, script: str = "imagenet.py") -> list[str]:
    """The command line of this project's side, or, of another script, of its pre-pass."""
    precision = "bf16" if asked.bf16 else "no"
    return [
        *(sys.executable, str(ROOT / "pipelines" / script), "--recipe", str(out.parent / "recipe.yaml")),
        *("--train", str(asked.shards / "train"), "--val", str(asked.shards / "val"), "--out", str(out)),
        *("--teacher", asked.teacher, "--teacher-weights", str(teacher), "--student", asked.student),
        *("--data.image_size", str(asked.side), "--data.num_threads", str(asked.workers)),
        *("--train.epochs", str(epochs), "--train.evaluate_every", str(epochs), "--train.mixed_precision", precision),
        *("--train.global_batch_size", str(asked.batch), *asked.our_options),
    ]


def theirs(asked: argparse.Namespace, teacher: Path, classes: int, epochs: int, out: Path) -> list[str]:
    """The command line of timm's side."""
    return [
        *(sys.executable, str(asked.timm_train), "--dataset", "wds/peer", "--data-dir", str(asked.shards)),
        *("--train-split", "train", "--val-split", "val", "--output", str(out), "--experiment", "peer"),
        *("--model", asked.student, "--num-classes", str(classes), "--input-size", "3", str(asked.side), str(asked.side)),
        *("--kd-model-name", f"local-dir:{teacher}", "--kd-temperature", str(TEMPERATURE), "--distill-loss-weight", "1"),
        *("--smoothing", "0", "--color-jitter", "0", "--train-interpolation", "bilinear", "--interpolation", "bilinear"),
        *("--opt", "momentum", "--lr", str(LEARNING_RATE), "--momentum", str(MOMENTUM), "--weight-decay", str(DECAY)),
        *(
            "--sched",
            "step",
            "--decay-epochs",
            "1000",
            "--warmup-epochs",
            "0",
            "--epochs",
            str(epochs),
            "--val-interval",
            str(epochs),
        ),
        *("--batch-size", str(asked.batch), "--workers", str(asked.workers), "--device", asked.device),
        *(["--amp", "--amp-dtype", "bfloat16"] if asked.bf16 else []),
        *asked.timm_options,
    ]


def seconds_of(command: list[str], threads: int, log: Path) -> Seconds:
    """The time of a process from its start to its end. Raises RuntimeError with its last lines where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    begin = time.perf_counter()
    before = os.times()
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent).returncode
    after = os.times()
    if code:
        raise RuntimeError(f"exit code {code} of {' '.join(command)}\n{log.read_text()[-2000:]}")
    core = after.children_user + after.children_system - before.children_user - before.children_system
    return Seconds(time.perf_counter() - begin, core)


def turn(asked: argparse.Namespace, number: int, images: int, classes: int, folder: Path) -> dict[str, Times]:
    """All sides, short and long; the order changes from turn to turn."""
    teacher, found = folder / "teacher", {}
    sides = ["ours", *(["cached"] if asked.cache_views else []), "timm"]
    for side in sides if number % 2 == 0 else reversed(sides):
        taken = []
        for epochs in (asked.short, asked.long):
            out = folder / f"{side}{number}-{epochs}"
            command = theirs(asked, teacher, classes, epochs, out) if side == "timm" else ours(asked, teacher, epochs, out)
            if side == "cached":
                command += ["--teacher.cache", str(folder / "cache")]
            taken.append(seconds_of(command, asked.threads, folder / f"{out.name}.log"))
        found[side] = Times(taken[0], taken[1], images * asked.short, images * asked.long)
        told = " and ".join(f"{each.wall:.1f} s ({each.core:.1f} core-seconds)" for each in taken)
        print(f"turn {number + 1}, {side}: {told}", flush=True)
    return found


def summary(turns: list[dict[str, Times]], side: str = "ours") -> dict[str, dict[str, float]]:
    """Medians over the turns of one of our sides and of timm's; the ratio is the median of the turns' own."""
    found = {}
    for kind, clock in itertools.product(("whole", "steady"), ("wall", "core")):
        rates = {name: [getattr(each[key], kind)(clock) for each in turns] for name, key in (("ours", side), ("timm", "timm"))}
        ratios = [mine / other for mine, other in zip(rates["ours"], rates["timm"], strict=True)]
        medians = {side: statistics.median(values) for side, values in rates.items()}
        found[f"{kind}, {clock}"] = {
            **medians,
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    return found


def prepaid(turns: list[dict[str, Times]], prepass: Seconds) -> str:
    """What the cached runs gain over timm's, and over ours without a cache, with the pre-pass paid by one run."""
    lines = []
    for clock in ("wall", "core"):
        for side in ("timm", "ours"):
            other = statistics.median(getattr(each[side].long, clock) for each in turns)
            mine = statistics.median(getattr(each["cached"].long, clock) for each in turns)
            paid = getattr(prepass, clock)
            lines.append(
                f"whole run, {clock}: {side} {other:.1f} s, cached {mine:.1f} s ({other / mine:.2f}x), and with the pre-pass of"
                f" {paid:.1f} s {other / (mine + paid):.2f}x"
            )
    return "\n".join(lines)


def as_text(found: dict[str, dict[str, float]], title: str = "images per second") -> str:
    """The summary for people."""
    rows = [[title, "ours", "timm", "ratio", "of single turns"]]
    for kind, row in found.items():
        rates = [f"{row['ours']:.1f}", f"{row['timm']:.1f}", f"{row['ratio']:.2f}x"]
        rows.append([f"{kind} time", *rates, f"{row['lowest']:.2f} to {row['highest']:.2f}"])
    return table(rows, "lrrrl")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises RecipeError."""
    parser = Parser(description=__doc__ or "")
    parser.add_argument("--timm-train", type=Path, required=True, metavar="FILE", help="timm's train.py")
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="with train/ and val/, of shards/prepare.py")
    parser.add_argument("--teacher", default="resnet18", help="timm name (%(default)s)")
    parser.add_argument("--student", default="resnet10t", help="timm name (%(default)s)")
    parser.add_argument("--side", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads of ours, processes of timm's (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="compute threads of each (%(default)s)")
    parser.add_argument("--short", type=int, default=1, help="epochs of the short run (%(default)s)")
    parser.add_argument("--long", type=int, default=3, help="epochs of the long run (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="turns of both sides (%(default)s)")
    parser.add_argument(
        "--cache-views", type=int, default=0, metavar="N", help="a side of ours with a teacher cache of N views"
    )
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast instead of float32")
    parser.add_argument("--device", default="cpu", help="timm's --device; ours takes a GPU where there is one (%(default)s)")
    parser.add_argument("--our-options", type=str.split, default=[], metavar="TEXT", help="more options for ours")
    parser.add_argument("--timm-options", type=str.split, default=[], metavar="TEXT", help="more options for train.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all times there")
    asked = parser.parse_args(argv)
    asked.timm_train, asked.shards = asked.timm_train.absolute(), asked.shards.absolute()
    if not asked.timm_train.is_file():
        raise RecipeError(f"--timm-train {asked.timm_train}: no such file; it is train.py of timm's repository")
    if not 1 <= asked.short < asked.long:
        raise RecipeError(f"--long {asked.long} must be more than --short {asked.short}, and that 1 at least")
    return asked


@command
def main(argv: Sequence[str]) -> None:
    """Prints the comparison, and writes it where that is asked. A run that fails raises."""
    asked = arguments(argv)
    with requests():
        index = ShardIndex.open(asked.shards / "train")
    images = index.num_samples // asked.batch * asked.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(RECIPE)
        make_teacher(asked.teacher, index.class_names, asked.side, folder / "teacher")
        if asked.cache_views:
            words = ["--views", str(asked.cache_views), "--out", str(folder / "cache")]
            command = ours(asked, folder / "teacher", asked.long, folder / "unused", "cache_teacher.py")
            prepass = seconds_of(command + words, asked.threads, folder / "cache.log")
        turns = [turn(asked, number, images, index.num_classes, folder) for number in range(asked.turns)]
    found = summary(turns)
    print(as_text(found))
    if asked.cache_views:
        print(as_text(summary(turns, "cached"), "images per second, cached"))
        print(prepaid(turns, prepass))
    if asked.json:
        facts = {"torch": torch.__version__, "timm": timm.__version__, "cores": len(os.sched_getaffinity(0))}
        options = {key: str(value) for key, value in vars(asked).items() if key not in ("json", "timm_train", "shards")}
        runs = [{side: asdict(times) for side, times in each.items()} for each in turns]
        asked.json.write_text(json.dumps({**facts, "options": options, "summary": found, "turns": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
