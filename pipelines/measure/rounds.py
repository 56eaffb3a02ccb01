"""Turns of steps and of pieces alone, and what they say of a step."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from pipelines.measure.ceiling import Alone
from pipelines.measure.measured_run import MeasuredRun
from pipelines.measure.report import MODELS, StepPart
from pipelines.measure.timeline import DATA, REST, TEACHER
from pipelines.setup.machine import meet

SETTLE = 3
"""Steps that are made after each pause and not counted: they use up what the loader made ready in it."""


class Round(NamedTuple):
    """The milliseconds that one turn found."""

    steps: list[dict[str, float]]
    unmarked: list[float]
    local: list[float]
    alone: list[dict[str, float]]
    """Those of the pieces that are in the step."""
    live_teacher: list[float]
    """Those of the live teacher alone, where the step reads a cache."""


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
