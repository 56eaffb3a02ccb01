"""The runs behind the cells: made where they are missing, the teacher first; found where they are there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.agreement import Control
from distill.config import RecipeError
from distill.files import RUN_MANIFEST, RUN_SUMMARY
from pipelines.setup.child_run import REFUSED, ended_badly, made, summary_of
from pipelines.tables.cells import Cell
from pipelines.tables.settings import TEACHER, folder, is_measured_only, recipe_of, teacher_cell

MEASURED = {"top1": "top1", "top5": "top5", "extra_parameters": "loss_parameters"}
"""Metric of a cell -> its name in a run's summary. Milliseconds are no number of a run."""
UNMEASURED = "no run measures it"


class Finished(NamedTuple):
    """One finished run."""

    summary: dict[str, Any]
    manifest: dict[str, Any]


def finished_runs(cell: Cell, out: Path) -> list[Finished]:
    """The cell's finished runs, by seed."""
    summaries = sorted(
        folder(cell, out).glob(f"seed*/{RUN_SUMMARY}"), key=lambda path: int(path.parent.name.removeprefix("seed"))
    )
    return [Finished(json.loads(p.read_text()), json.loads((p.parent / RUN_MANIFEST).read_text())) for p in summaries]


def figure(cell: Cell) -> str | None:
    """The name of the cell's metric in a run's summary; None where no run measures it."""
    if is_measured_only(cell):
        return "teacher_top1" if cell.metric == "top1" else None
    return MEASURED.get(cell.metric)


def measured(cell: Cell, runs: Sequence[Finished]) -> list[float]:
    """The cell's metric in each of its runs; empty where runs do not measure it."""
    key = figure(cell)
    return [float(run.summary[key]) for run in runs if key is not None and run.summary.get(key) is not None]


def trainable(cells: Sequence[Cell]) -> list[Cell]:
    """Those of the cells that a run of this project measures, after a printed line for each of the others.

    RecipeError with the reason where none is left.
    """
    found = [cell for cell in cells if figure(cell) is not None]
    others = [f"{cell.name}: {UNMEASURED}" for cell in cells if figure(cell) is None]
    if not found:
        raise RecipeError(others[0] if len(others) == 1 else f"none of the {len(others)} cells can be run; {others[0]}")
    for line in others:
        print(f"left out: {line}", flush=True)
    return found


def runs_of(cell: Cell, seeds: int) -> int:
    """How many runs of a cell are wanted where methods get `seeds`: one of a teacher, which teaches in all of them."""
    return 1 if cell.method == TEACHER else seeds


def make(wanted: Sequence[Cell], seeds: int, out: Path, data: Path | None, train: Sequence[str], control: Control) -> int:
    """Makes the missing runs of the cells; 1 where some run failed or was refused.

    All cells get a seed before any gets the next one; a teacher has one run. Cells that no run measures are left out, as
    `trainable` says. RecipeError for a teacher that is refused.
    """
    wanted = trainable(wanted)
    planned = [
        (cell, recipe_of(cell, out, seed, data)) for seed in range(seeds) for cell in wanted if seed < runs_of(cell, seeds)
    ]
    failed, seen = False, set()
    for cell, recipe in planned:
        if recipe.out in seen:
            continue
        seen.add(recipe.out)
        theirs = teacher_cell(cell)
        if theirs is not None and (teacher := recipe_of(theirs, out, 0, data)).out not in seen:
            seen.add(teacher.out)
            code, said = made(teacher, train, control)
            if code:
                raise ended_badly(f"the teacher {cell.teacher}", code, said)
            print(f"{teacher.out}: top-1 {summary_of(teacher)['top1']:.2f}", flush=True)
        code, said = made(recipe, train, control)
        if code:
            failed = True
            print(f"{recipe.out}: {'refused' if code == REFUSED else f'failed with exit code {code}'}: {said}", flush=True)
        else:
            print(f"{recipe.out}: top-1 {summary_of(recipe)['top1']:.2f}", flush=True)
    return int(failed)
