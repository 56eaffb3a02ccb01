"""The verdict: top-1 of each run beside the student alone, the published number and the teacher."""

from __future__ import annotations

from html import escape

import numpy as np

from distill.text_table import table
from pipelines.reporting.accuracy import difference, flips_between
from pipelines.reporting.drawing import bars
from pipelines.reporting.page import Panel
from pipelines.reporting.runs import Comparison, RunRecord

NOT_RUN, NOT_YET = "not run", "no evaluation yet"


def runs_table(comparison: Comparison) -> str:
    """One row for each run, as text."""
    head = ["run", "student", "teacher", "top-1 %", "best %", "alone", "teacher %", "images/s", "seconds", "state"]
    rows = []
    for run in comparison.runs:
        summary = run.summary or {}
        rows.append(
            [
                run.name,
                run.student,
                run.teacher or "-",
                _percent(run.top1),
                _percent(run.best_top1),
                _signed(gain(comparison, run)),
                _percent(run.teacher_top1),
                f"{summary['images_per_second']:.0f}" if summary else "-",
                f"{summary['seconds']:.1f}" if summary else "-",
                run.state,
            ]
        )
    return table([head, *rows], "lllrrrrrrl")


def gain(comparison: Comparison, run: RunRecord) -> float | None:
    """Points of top-1 above the student alone; None where either is missing."""
    baseline = comparison.baseline_of(run)
    if baseline is None or baseline.top1 is None or run.top1 is None:
        return None
    return run.top1 - baseline.top1


def seeds(comparison: Comparison) -> dict[str, list[float]]:
    """Top-1 of the runs of each experiment, under the name of its first run."""
    names: dict[str, str] = {}
    found: dict[str, list[float]] = {}
    for run in comparison.runs:
        if run.top1 is not None:
            found.setdefault(names.setdefault(run.experiment, run.name), []).append(run.top1)
    return found


def facts(comparison: Comparison) -> list[str]:
    """The verdict in words."""
    lines = []
    for run in comparison.distilled:
        lines.append(f"{run.name}: {run.teacher or 'no teacher'} -> {run.student}, {run.method}; {run.state}")
        if run.top1 is None:
            lines.append(f"{run.name}: {NOT_YET}")
            continue
        lines.append(f"{run.name}: top-1 {run.top1:.2f} %; against {_against(comparison, run)}")
        lines += _interval(comparison, run)
    for name, values in seeds(comparison).items():
        if len(values) > 1:
            spread = f"{min(values):.2f} to {max(values):.2f}"
            lines.append(f"{name} at {len(values)} seeds: mean {np.mean(values):.2f} %, {spread}")
    return lines


def panel(comparison: Comparison) -> Panel:
    """Large numbers for each run; bars for several."""
    body = "".join(_card(comparison, run) for run in comparison.distilled)
    found = seeds(comparison)
    if len(comparison.runs) > 1 and found:
        many = any(len(values) > 1 for values in found.values())
        note = "Bars are means over seeds, lines reach from the lowest to the highest." if many else "One seed each."
        body += bars(found, "top-1 %", f"Top-1 of each run. {note}")
    body = f"<div class=verdict>{body}</div><pre>{escape(runs_table(comparison))}</pre>"
    lines = facts(comparison)
    return Panel("Verdict", body, tuple(lines))


def _against(comparison: Comparison, run: RunRecord) -> str:
    return ", ".join(f"{name} {text}" for name, text, _ in _differences(comparison, run))


def _differences(comparison: Comparison, run: RunRecord) -> list[tuple[str, str, float | None]]:
    """Name, words and points of each comparison."""
    alone = comparison.baseline_of(run)
    found = [
        ("student alone", None if alone is None else alone.top1, NOT_RUN if alone is None else "not evaluated"),
        ("published", comparison.published, "not given"),
        ("teacher", run.teacher_top1, "not evaluated"),
    ]
    if run.teacher is None:  # it is the student alone
        found = found[1:2]
    said = list[tuple[str, str, float | None]]()
    for name, other, absent in found:
        if other is None:
            said.append((name, absent, None))
        elif run.top1 is None:
            said.append((name, NOT_YET, None))
        else:
            said.append((name, f"{run.top1 - other:+.2f} points", run.top1 - other))
    return said


def _interval(comparison: Comparison, run: RunRecord) -> list[str]:
    both = comparison.against_baseline(run)
    if both is None:
        return []
    baseline, dump, alone = both
    mine, _, found = flips_between(dump, alone)
    mean, half = difference(found, len(mine))
    sure = "larger than" if abs(mean) > half else "within"
    return [
        f"{run.name}: {mean:+.2f} ± {half:.2f} points over {baseline.name} on these {len(mine):,} images (95 %):"
        f" {sure} what the choice of images explains; another seed may differ by more"
    ]


def _card(comparison: Comparison, run: RunRecord) -> str:
    numbers = []
    for name, text, value in _differences(comparison, run):
        kind = "none" if value is None else "up" if value > 0 else "down" if value < 0 else "same"
        mark = {"up": "&#9650; ", "down": "&#9660; "}.get(kind, "")
        numbers.append(f"<div class='delta {kind}'><b>{mark}{escape(text)}</b><span>{escape(name)}</span></div>")
    large = "&ndash;" if run.top1 is None else f"{run.top1:.2f}<small>%</small>"
    stopped = "" if run.summary is not None else f"<p class=warn>{escape(run.state)}</p>"
    pair = f"{escape(run.teacher or 'no teacher')} &rarr; {escape(run.student)}"
    return (
        f"<article class=card><h3>{escape(run.name)}</h3><p>{pair}<br>{escape(run.method)}</p>"
        f"<div class=large>{large}<span>top-1</span></div>{''.join(numbers)}{stopped}</article>"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
