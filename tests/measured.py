"""Benchmarks by real processes, as tests/processes.py starts runs: what both the benchmark's tests and the plan's look at."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipelines.measure.report import Report
from tests.processes import CONTEXT, Job, rank_environments


def _enter(argv: list[str], environment: dict[str, str], log: str) -> None:
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from pipelines.benchmark import main

    torch.set_num_threads(1)
    if "GATHERED" in environment:
        note_gathers(Path(environment["GATHERED"]))
    code = main(argv)
    sys.stdout.flush()
    sys.exit(code)


def note_gathers(file: Path) -> None:
    """Every all-gather of this process adds a line to the file: the bytes that came from the other processes."""
    import torch.distributed as dist

    real = dist.all_gather_into_tensor

    def gather(everyone, own, *arguments, **options):
        with file.open("a") as lines:
            lines.write(json.dumps([everyone.nbytes - own.nbytes, len(own)]) + "\n")
        return real(everyone, own, *arguments, **options)

    dist.all_gather_into_tensor = gather


def start_benchmark(argv: Sequence[str], log: Path, world_size: int = 1, gathered: Path | None = None) -> Job:
    """Starts `pipelines/benchmark.py ARGV` on `world_size` CPU processes; the first notes its gathers in `gathered`."""
    environments = rank_environments(world_size)
    if gathered is not None:
        environments[0]["GATHERED"] = str(gathered)
    ranks = []
    for environment in environments:
        ranks.append(CONTEXT.Process(target=_enter, args=(list(argv), environment, str(log))))
        ranks[-1].start()
    return Job(ranks, log)


def arguments(digits: Path, *more: str) -> list[str]:
    """A small pair on small shards."""
    return [
        *("--train", str(digits / "train"), "--val", str(digits / "val"), "--data.prepare", "none"),
        *("--teacher", "cifar_resnet14", "--teacher-weights", "random", "--train.global_batch_size", "16"),
        *("--steps", "6", "--rounds", "3", "--warm-up", "2", "--data", "memory"),
        *more,
    ]


def measured(argv: Sequence[str], out: Path, world_size: int = 1, gathered: Path | None = None) -> Report:
    """The report of a benchmark; fails with its output unless it exits with 0."""
    log = out.with_suffix(".log")
    job = start_benchmark([*argv, "--json", str(out)], log, world_size, gathered)
    codes = job.wait()
    assert codes == [0] * world_size, f"exit codes {codes}:\n{job.text()}"
    return Report.read(out)
