"""The report in its order: panels for the page, facts alone for the terminal."""

from __future__ import annotations

import shlex
from itertools import starmap
from pathlib import Path

from distill.files import write_atomically
from pipelines.reporting import classes, confidence, curves, maps, places, reproduce, samples, verdict
from pipelines.reporting.page import Panel, html, markdown
from pipelines.reporting.pictures import Pictures
from pipelines.reporting.runs import Comparison


def panels(comparison: Comparison) -> list[Panel]:
    """Every panel, also those that say why they are empty."""
    pictures = Pictures.of(comparison)
    found = [
        verdict.panel(comparison),
        curves.panel(comparison),
        curves.cost_panel(comparison),
        classes.panel(comparison, pictures),
        confidence.panel(comparison),
        classes.flip_panel(comparison, pictures),
        maps.embedding_panel(comparison),
        maps.matrix_panel(comparison),
        maps.similarity_panel(comparison),
        places.region_panel(comparison, pictures),
        places.heat_panel(comparison, pictures),
        samples.batch_panel(comparison),
        samples.data_panel(comparison, pictures),
        reproduce.panel(comparison),
    ]
    if lacks := [*starmap(_lack, comparison.missing_dumps().items()), *_left_out(comparison)]:
        found.insert(1, Panel("What this report lacks", "", tuple(lacks)))
    return found


def _lack(file: Path, options: list[str]) -> str:
    return f"{file} is missing; `python pipelines/evaluate.py {shlex.join(options)}` writes it"


def _left_out(comparison: Comparison) -> list[str]:
    """A line about the dumps that cannot be held against the others."""
    others = [name for name in comparison.everyone if name not in comparison.voices]
    shown = "calibration, embeddings, logits, similarity and heat maps are shown without them"
    return (
        [f"{', '.join(others)}: evaluated on other images than {next(reversed(comparison.voices))}; {shown}"] if others else []
    )


def title_of(comparison: Comparison) -> str:
    """The pair where there is one, else how many runs."""
    found = {(run.teacher or "no teacher", run.student) for run in comparison.distilled}
    if len(found) == 1:
        teacher, student = found.pop()
        return f"{teacher} → {student}: what the student learned"
    return f"{len(comparison.distilled)} runs side by side"


def write(comparison: Comparison, path: Path) -> Path:
    """Writes the page and the Markdown beside it, whose path it returns."""
    found, title = panels(comparison), title_of(comparison)
    beside = path.with_suffix(".md")
    write_atomically(path, html(title, found))
    write_atomically(beside, markdown(title, found, verdict.runs_table(comparison)))
    return beside


def as_text(comparison: Comparison) -> str:
    """The table of runs and the facts that need no drawing, for the terminal."""
    lines = [verdict.runs_table(comparison), "", *verdict.facts(comparison)]
    for run in comparison.distilled:
        if run.dump is not None:
            lines += [*classes.class_facts(comparison, run), *classes.flip_facts(comparison, run)]
    if comparison.voices:
        lines += [*confidence.facts(comparison), *maps.matrix_facts(comparison), *maps.similarity_facts(comparison)]
    return "\n".join(lines)
