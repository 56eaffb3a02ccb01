"""The ledger of a training step: the time of every part, what the models take alone, memory, and what to change.

accelerate launch pipelines/benchmark.py --help
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt
from pipelines.setup.launcher import end_with_launcher, exit_with

if __name__ == "__main__":
    end_at_interrupt()
    end_with_launcher()

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from distill.command_line import Parser, command, new_file
from distill.config import RecipeError, as_dict
from distill.losses import LOSSES
from pipelines.measure.ceiling import Alone, loader_rate, measure_machine, measure_network
from pipelines.measure.measured_run import Asked, MeasuredRun
from pipelines.measure.report import FORMAT, CacheUse, Ceiling, Report, Setting, Step, StepPart
from pipelines.measure.rounds import measure_rounds, middle, parts_of, ratio
from pipelines.measure.show import as_text, bottleneck, plot
from pipelines.measure.timeline import DATA, TEACHER
from pipelines.setup.arguments import parse
from pipelines.setup.machine import keep_freed_memory, leave_together, meet
from pipelines.setup.out_of_memory import memory_explained

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
    live, ms = statistics.median(live_teacher), {part.name: part.ms for part in parts}
    saved = live - ms.get(TEACHER, 0.0)
    # a live step computes for longer, and its loader works meanwhile: it waits less
    hidden = max(0.0, min(saved, ms.get(DATA, 0.0)))
    return CacheUse(row_bytes, live, sum(ms.values()) + saved - hidden)


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
