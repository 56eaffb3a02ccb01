"""The ledger of a training step: the time of every part, what the models take alone, memory, and what to change.

accelerate launch pipelines/benchmark.py --help
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt
from pipelines.setup.launcher import end_with_launcher, exit_with

if __name__ == "__main__":
    end_at_interrupt()
    end_with_launcher()

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from distill.agreement import Control
from distill.command_line import Parser, command, new_file, requests
from distill.config import RecipeError, as_dict
from distill.losses import LOSSES
from distill.protocols import Batch
from distill.recipe import Recipe
from distill.teacher_cache.teacher import CachedTeacher
from pipelines.measure.ceiling import Alone, loader_rate, measure_machine, measure_network
from pipelines.measure.memory import Arrivals, MemoryTimeline, memory_use
from pipelines.measure.report import (
    FORMAT,
    MODELS,
    CacheUse,
    Ceiling,
    MemoryUse,
    Report,
    Setting,
    Step,
    StepPart,
    Traffic,
    WarmUp,
)
from pipelines.measure.show import as_text, bottleneck, plot
from pipelines.measure.timeline import DATA, REST, TEACHER, Communication, Timeline, endless, make_steps, marked
from pipelines.setup.arguments import parse
from pipelines.setup.build import build
from pipelines.setup.data import Splits, build_splits, check_mixing
from pipelines.setup.machine import (
    build_accelerator,
    collective_timeout,
    keep_freed_memory,
    leave_together,
    meet,
    micro_batch_of,
)
from pipelines.setup.observers import compile_report
from pipelines.setup.out_of_memory import memory_explained

SETTLE = 3
"""Steps that are made after each pause and not counted: they use up what the loader made ready in it."""
IN_MEMORY = 2
"""Global batches that take turns with `--data memory`."""

EPILOG = """
examples:
  accelerate launch pipelines/benchmark.py --json ledger.json --plot ledger.png
      the digits distillation, on data that comes with scikit-learn
  accelerate launch pipelines/benchmark.py --recipe pipelines/recipes/imagenet/resnet34_resnet18_sdd_dkd.yaml \\
      --train data/imagenet/train --val data/imagenet/val --data memory --steps 50 --train.mixed_precision bf16

every other option is one of the recipe's: pipelines/imagenet.py --help lists them. Teachers that would be downloaded or trained
first have random weights here: the time of a step does not depend on them.
exit codes: 0 done, 1 failed, 2 the request was wrong.
"""


class Asked(NamedTuple):
    """The command line."""

    recipe: Recipe
    steps: int
    warm_up: int
    rounds: int
    data: str
    clock: str
    json: Path | None
    plot: Path | None


def arguments(argv: Sequence[str]) -> Asked:
    """The command line: the options of this command, and the recipe that all others make. Raises RecipeError."""
    usage = "accelerate launch pipelines/benchmark.py [--recipe FILE] [--SECTION.FIELD VALUE] [options]"
    parser = Parser(usage=usage, description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("--steps", type=int, default=20, help="steps that are measured (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of steps and pieces alone (%(default)s)")
    parser.add_argument(
        "--data", choices=("shards", "memory"), default="shards", help="memory: batches that lie on the device (%(default)s)"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of this process's threads, for a CPU that others use too; it sees no waiting (%(default)s)",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="draw the step there, as PNG, PDF or SVG")
    ours, rest = parser.parse_known_args(argv)
    request = parse(rest, LOSSES)
    for name, value, least in (("steps", ours.steps, 1), ("warm-up", ours.warm_up, 1), ("rounds", ours.rounds, 1)):
        if value < least:
            raise RecipeError(f"--{name}: {value} is less than {least}")
    if ours.clock == "cpu" and (ours.data != "memory" or torch.cuda.is_available()):
        raise RecipeError("--clock: cpu counts what all threads of this process do; it needs --data memory and no GPU")
    rounds = min(ours.rounds, ours.steps)
    return Asked(request.recipe, ours.steps, ours.warm_up, rounds, ours.data, ours.clock, ours.json, ours.plot)


def measurable(recipe: Recipe, out: str) -> Recipe:
    """The recipe without what is no part of a plain step: logs, trackers, profiles, and weights from elsewhere."""
    teacher, student = recipe.teacher, recipe.student
    if teacher.weights in ("pretrained", "train") and not teacher.cache:  # a cache is of these weights
        teacher = dataclasses.replace(teacher, weights="random", class_map=None)
    if student.initial_weights == "pretrained":
        student = dataclasses.replace(student, initial_weights="random")
    report = dataclasses.replace(recipe.report, log_every=10**9, trackers=(), gradient_shares=False, profile_steps=0)
    return dataclasses.replace(recipe, out=out, teacher=teacher, student=student, report=report)


class MeasuredRun:
    """A run, its models and data, and the line on which its steps set their marks."""

    def __init__(self, asked: Asked, out: str) -> None:
        self.asked, self.recipe = asked, measurable(asked.recipe, out)
        self.accelerator = build_accelerator(self.recipe)
        self.batch = micro_batch_of(self.recipe, self.accelerator.num_processes)
        check_mixing(self.recipe, self.batch)
        with requests():
            self.splits: Splits = build_splits(self.recipe, self.accelerator)
            self.run, self.models = build(self.recipe, self.accelerator, self.splits, Control(collective_timeout(self.recipe)))
        self.run.eval_loader.close()
        self.run.distiller.train()
        self.row_bytes = self.run.teacher.codec.row.itemsize if isinstance(self.run.teacher, CachedTeacher) else 0
        """Of a teacher cache; 0 where the teacher is live."""
        self.communication = Communication(self.run)
        self.line = Timeline(self.accelerator.device, time.process_time if asked.clock == "cpu" else None)
        self.stream = self._stream()

    def _stream(self) -> Iterator[Batch]:
        stream = endless(self.run.train_loader)
        if self.asked.data == "memory":
            return cycle(list(islice(stream, IN_MEMORY * self.run.settings.accumulate)))
        return stream

    def steps(self, count: int, marks: bool = False, local: bool = False) -> list[dict[str, float]]:
        """Milliseconds of each part of `count` steps; without marks a step has two parts, with `local` nothing is reduced."""
        if local:
            with self.accelerator.no_sync(self.run.distiller):
                return self.steps(count)
        if marks:
            with marked(self.run, self.line, self.communication):
                make_steps(self.run, self.stream, count, self.line)
        else:
            make_steps(self.run, self.stream, count, self.line)
        return self.line.cut()

    def warm_up(self) -> WarmUp:
        """The first steps, on which compilers, allocators and DDP's buckets settle."""
        taken = []
        for _ in range(self.asked.warm_up):
            begin = time.perf_counter()  # compilers work on the host, in processes of their own
            self.steps(1)
            taken.append(time.perf_counter() - begin)
        compiles = self.recipe.train.compile != "none"
        extra = 1000 * max(0.0, taken[0] - taken[-1]) if compiles and len(taken) > 1 else None
        return WarmUp(len(taken), sum(taken), 1000 * taken[0], extra, compile_report() if compiles else "")

    def memory_and_traffic(self) -> tuple[MemoryUse, Traffic]:
        """The memory and the traffic of a step, seen in two steps that are not measured."""
        line = MemoryTimeline(self.run)
        with marked(self.run, line, self.communication), torch.autograd.graph.saved_tensors_hooks(line.pack, lambda t: t):
            make_steps(self.run, self.stream, 1, self.line)
        memory = memory_use(self.run, line)
        arrivals = Arrivals(self.accelerator.device)
        self.communication.buckets.clear()
        with arrivals.observe(self.run):
            make_steps(self.run, self.stream, 1, self.line)
        self.line.cut()
        train = self.splits.train
        trained = [p for p in self.run.distiller.parameters() if p.requires_grad]
        traffic = Traffic(
            gradient_bytes=sum(p.nbytes for p in trained),
            buckets=list(self.communication.buckets),
            arrivals=arrivals.timetable(),
            gathers={name: list(each.traffic()) for name, each in self.models.criteria.items() if each.traffic()},
            bytes_per_image=float(train.records["size"].mean()) + self.row_bytes,
            training_images=train.num_samples,
        )
        return memory, traffic


class Round(NamedTuple):
    """The milliseconds that one turn found."""

    steps: list[dict[str, float]]
    unmarked: list[float]
    local: list[float]
    alone: list[dict[str, float]]
    """Of the pieces that are in the step."""
    live_teacher: list[float]
    """Of the live teacher alone, where the step reads a cache."""


def measure_rounds(bench: MeasuredRun, alone: Alone) -> list[Round]:
    """Steps with marks, without marks, without all-reduce and the pieces alone, in turn: a machine that is slower for a while
    is slower for all of them."""
    asked, several = bench.asked, bench.accelerator.num_processes > 1
    rounds = []
    alone.make_steps(1, bench.line)
    bench.line.cut()
    for number in range(asked.rounds):
        count = len(range(number, asked.steps, asked.rounds))
        meet()
        if asked.data == "shards" or bench.line.device.type == "cuda":
            bench.steps(SETTLE)
        steps = bench.steps(count, marks=True)
        unmarked = [sum(step.values()) for step in bench.steps(count)]
        local = [sum(step.values()) for step in bench.steps(count, local=True)] if several else []
        if bench.line.device.type == "cuda":
            alone.make_steps(SETTLE, bench.line)
            bench.line.cut()
        alone.make_steps(count, bench.line)
        pieces = bench.line.cut()
        live = [piece.pop(TEACHER) for piece in pieces] if bench.row_bytes else []
        rounds.append(Round(steps, unmarked, local, pieces, live))
    return rounds


def middle(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each part over the middle half of the steps by duration: means of the same steps sum as the steps do."""
    ordered = sorted(steps, key=lambda step: sum(step.values()))
    cut = len(ordered) // 4
    kept = ordered[cut : len(ordered) - cut]
    names = list(dict.fromkeys(name for step in kept for name in step))
    return {name: sum(step.get(name, 0.0) for step in kept) / len(kept) for name in names}


def parts_of(steps: dict[str, float], alone: dict[str, float]) -> list[StepPart]:
    """The parts in order of appearance; the rest comes last."""
    total = sum(steps.values())
    names = [name for name in steps if name != REST] + [REST]
    return [StepPart(n, steps.get(n, 0.0), steps.get(n, 0.0) / total, alone.get(n) if n in MODELS else None) for n in names]


def ratio(turn: Round) -> float:
    """The ratio of one round: its median step without waiting for data, over its median of the models alone."""
    working = statistics.median(sum(step.values()) - step[DATA] for step in turn.steps)
    return working / statistics.median(sum(step.values()) for step in turn.alone)


def setting_of(bench: MeasuredRun) -> Setting:
    """The setting of a measurement: the machine, the pair and the options."""
    recipe, device = bench.recipe, bench.accelerator.device
    on_gpu = device.type == "cuda"
    spec = bench.models.student.input_spec
    return Setting(
        device=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        on_gpu=on_gpu,
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        processes=bench.accelerator.num_processes,
        precision=bench.accelerator.mixed_precision,
        compiled=recipe.train.compile,
        channels_last=recipe.train.channels_last,
        teacher_precision=recipe.teacher.precision,
        teacher=recipe.teacher.name,
        student=recipe.student.name,
        losses=list(recipe.loss),
        advice={name: criterion.advice() for name, criterion in bench.models.criteria.items()},
        image_size=[spec.height, spec.width],
        micro_batch=bench.batch,
        accumulate=recipe.train.accumulate,
        data=bench.asked.data,
        clock=bench.asked.clock,
        recipe=as_dict(recipe),
    )


def cpu_name() -> str:
    """The CPU's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def measure(asked: Asked, out: str) -> Report:
    """The whole benchmark; every process calls it, and each gets its own report. `out` is a folder for what a run leaves."""
    bench = MeasuredRun(asked, out)
    with memory_explained(bench.recipe, bench.run, bench.models):
        warm_up = bench.warm_up()
    memory, traffic = bench.memory_and_traffic()
    alone = Alone(bench.recipe, bench.run, bench.models, bench.batch)
    rounds = measure_rounds(bench, alone)
    steps = [step for turn in rounds for step in turn.steps]
    unmarked = [ms for turn in rounds for ms in turn.unmarked]
    local = [ms for turn in rounds for ms in turn.local]
    pieces = [step for turn in rounds for step in turn.alone]
    setting = setting_of(bench)
    parts = parts_of(middle(steps), middle(pieces))
    ratios = [ratio(turn) for turn in rounds]
    machine = measure_machine(bench.line, setting.precision)
    network = measure_network(bench.line, traffic.gradient_bytes)
    ceiling = Ceiling(
        models_ms=sum(part.alone_ms or 0.0 for part in parts),
        ratio=statistics.median(ratios),
        ratios=ratios,
        loader_images_per_second=loader_rate(bench.run, max(20 if setting.on_gpu else 3, 256 // bench.batch)),
        copy_gigabytes_per_second=machine.copy_gigabytes_per_second,
        host_to_device_gigabytes_per_second=machine.host_to_device_gigabytes_per_second,
        teraflops=machine.teraflops,
        teraflops_float32=machine.teraflops_float32,
        gigaflops_per_image={
            name: flops / 1e9 for name, flops in alone.flops_per_image().items() if not (bench.row_bytes and name == TEACHER)
        },
        network_bytes_per_second=None if network is None else network.bandwidth,
        network_latency_ms=None if network is None else network.latency_ms,
    )
    bench.run.train_loader.close()
    total = sum(part.ms for part in parts)
    # the processes wait for each other in every step: the slowest says how fast all are
    slowest = max(gather_object([total]))
    step = Step(
        ms=total,
        images_per_second=1000 * bench.run.settings.global_batch_size / slowest,
        steps=len(steps),
        all_ms=[sum(each.values()) for each in steps],
        unmarked_ms=statistics.median(unmarked),
        local_ms=statistics.median(local) if local else None,
    )
    sentence = bottleneck(parts, setting, ceiling)
    cache = cache_use(bench.row_bytes, parts, [ms for turn in rounds for ms in turn.live_teacher])
    return Report(FORMAT, setting, warm_up, step, parts, ceiling, memory, traffic, sentence, cache)


def cache_use(row_bytes: int, parts: list[StepPart], live_teacher: list[float]) -> CacheUse | None:
    """The gain of a step that reads a teacher cache; None for one that does not."""
    if not row_bytes:
        return None
    live = statistics.median(live_teacher)
    return CacheUse(row_bytes, live, sum(part.ms for part in parts if part.name != TEACHER) + live)


@command
def main(argv: Sequence[str]) -> None:
    """The report, printed by the main process and written where that is asked."""
    asked = arguments(argv)
    if not torch.cuda.is_available():
        keep_freed_memory()
    with tempfile.TemporaryDirectory() as out:
        report = measure(asked, out)
    if PartialState().is_main_process:
        print(as_text(report))
        if asked.json is not None:
            report.write(asked.json)
        if asked.plot is not None:
            plot(report, asked.plot)
    leave_together(meet)


if __name__ == "__main__":
    exit_with(main)
