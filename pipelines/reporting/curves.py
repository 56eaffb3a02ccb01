"""Curves of a run's log with its marks, and its ledger of time and memory."""

from __future__ import annotations

import json
from html import escape
from itertools import pairwise
from typing import Any

from pipelines.reporting.drawing import ledger, lines, stacked
from pipelines.reporting.page import Panel, grid, missing
from pipelines.reporting.runs import Comparison, RunRecord

LEDGER = "ledger.json"
LOSS, SHARE = "loss/", "gradient_share/"


def marks(run: RunRecord) -> dict[str, list[int]]:
    """Steps at which a run was resumed, held a step back, or stopped for good."""
    found = {
        "resumed": [int(event["step"]) for event in run.events if event["event"] == "resumed"],
        # the log counts them, so the mark is at the first line that knows of one more
        "skipped": [
            int(after["step"])
            for before, after in pairwise([{"step": 0}, *run.steps])
            if after.get("skipped_steps", 0) > before.get("skipped_steps", 0)
        ],
        "stopped": [] if run.summary is not None else [run.last_step],
    }
    return {kind: steps for kind, steps in found.items() if steps}


def column(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one figure of the log, where it is there."""
    there = [row for row in rows if name in row]
    return [row["step"] for row in there], [row[name] for row in there]


def facts(run: RunRecord) -> list[str]:
    """The log in words."""
    if not run.metrics:
        return [f"{run.name}: metrics.jsonl is empty or missing; the run stopped before its first line"]
    said = [f"{run.name}: {len(run.steps)} logged steps, {len(run.evaluations)} evaluations"]
    said += [f"{kind} at step {', '.join(f'{step:,}' for step in steps)}" for kind, steps in marks(run).items()]
    return ["; ".join(said)]


def title_of_curve(run: RunRecord) -> str:
    """The text of the figure of top-1 over training."""
    return f"Top-1 of {run.name} over training"


def panel(comparison: Comparison) -> Panel:
    """Curves of each distilled run, the student alone beside them."""
    said, body = [], ""
    for run in comparison.distilled:
        said += facts(run)
        figures = _figures(comparison, run)
        if figures:
            body += f"<h3>{escape(run.name)}</h3>{grid(figures)}"
    return Panel("Curves", body, tuple(said))


def _figures(comparison: Comparison, run: RunRecord) -> list[str]:
    found, seen = [], marks(run)
    if run.evaluations:
        series = {f"{run.name}": column(run.evaluations, "eval/top1")}
        baseline = comparison.baseline_of(run)
        if baseline is not None and baseline.evaluations:
            series[f"{baseline.name} (alone)"] = column(baseline.evaluations, "eval/top1")
        levels = {} if run.teacher_top1 is None else {"teacher": run.teacher_top1}
        found.append(lines(series, "top-1 %", title_of_curve(run), levels, seen))
    if not run.steps:
        return found
    names = [name for name in run.steps[-1] if name.startswith(LOSS)]
    losses = {name.removeprefix(LOSS): column(run.steps, name) for name in names}
    positive = all(value > 0 for _, values in losses.values() for value in values)
    scale = ", logarithmic" if positive else ""
    found.append(lines(losses, "loss", f"Loss terms of {run.name}, unweighted{scale}", marks=seen, log=positive))
    shares = {name.removeprefix(SHARE): column(run.steps, name) for name in run.steps[-1] if name.startswith(SHARE)}
    if shares:
        x = next(iter(shares.values()))[0]
        alt = f"Share of each weighted term in the gradient's norm, {run.name}"
        found.append(stacked(x, {name: y for name, (_, y) in shares.items()}, alt))
    found.append(lines({"learning rate": column(run.steps, "lr")}, "rate", f"Learning rate of {run.name}", marks=seen))
    outside = {name: column(run.steps, name) for name in run.steps[-1] if name.endswith("complementary_share")}
    if outside:
        found.append(lines(outside, "share", f"Share of complementary regions over training, {run.name}"))
    return found


def cost_facts(run: RunRecord) -> list[str]:
    """Time in words."""
    if run.summary is None:
        rate = run.steps[-1]["images_per_second"] if run.steps else None
        said = "no step logged" if rate is None else f"{rate:.0f} images/s so far"
        return [f"{run.name}: {run.state}, so there is no total; {said}"]
    summary = run.summary
    said = f"{run.name}: {summary['seconds']:,.1f} s in all, {summary['images_per_second']:,.0f} images/s of training"
    writing = summary.get("checkpoint_seconds", {})
    if writing:
        waited = writing["copying"] + writing["waiting"]
        said += f"; checkpoints held it up for {waited:.2f} s and took {writing['writing']:.2f} s beside it"
    if run.manifest.get("teacher_cache"):
        said += f"; its teacher was read from a cache ({run.manifest['teacher_cache']})"
    if summary.get("bad_samples"):
        said += f"; {summary['bad_samples']} bad samples"
    return [said]


def cost_panel(comparison: Comparison) -> Panel:
    """Images per second over each run, and the benchmark's ledger where there is one."""
    if not any(run.metrics for run in comparison.distilled):
        return missing("Time and memory", ["no run has a line in its log"])
    said, figures = [], []
    for run in comparison.distilled:
        said += cost_facts(run)
        if run.steps:
            rates = {run.name: column(run.steps, "images_per_second")}
            alt = f"Images per second of {run.name}, mean since its start, pauses left out"
            figures.append(lines(rates, "images/s", alt, marks=marks(run)))
        path = run.folder / LEDGER
        if path.is_file():
            figures += _ledger(run, json.loads(path.read_text()))
        else:
            said.append(
                f"Not shown: parts of a step and memory of {run.name}; `pipelines/benchmark.py --json {path}` writes them"
            )
    return Panel("Time and memory", grid(figures), tuple(said))


def _ledger(run: RunRecord, found: dict[str, Any]) -> list[str]:
    parts = {part["name"]: part["ms"] for part in found["parts"]}
    owners = {name: held / 2**20 for name, held in found["memory"]["owners"].items()}
    return [
        ledger(parts, "ms of a step", f"Parts of one step of {run.name}, as pipelines/benchmark.py measured them"),
        ledger(owners, "MiB", f"Memory of one process of {run.name} by owner"),
    ]
