"""What a table costs before it is made: runs, images, hours from a ledger of measured rates, and disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.config import RecipeError
from distill.files import RUN_SUMMARY
from distill.models.describe import count_parameters, create_outline
from distill.recipe import Recipe
from distill.text_table import table
from pipelines.tables.cells import Cell, rows_of
from pipelines.tables.runs import figure, runs_of
from pipelines.tables.settings import is_measured_only, recipe_of, teacher_cell

TRAINING_IMAGES = {"cifar10": 50_000, "cifar10_240": 50_000, "cifar100": 50_000, "cub200": 5_994, "imagenet": 1_281_167}
"""Images of an epoch, by data set; digits are few."""
STATES = 2
"""Numbers that a checkpoint keeps for each weight: the weight and its momentum."""


class Job(NamedTuple):
    """One run that a table needs."""

    cell: Cell
    recipe: Recipe
    done: bool

    @property
    def images(self) -> int:
        """Training images that the run sees."""
        if is_measured_only(self.cell):
            return 0
        return self.recipe.train.epochs * TRAINING_IMAGES.get(self.cell.dataset, 1_347)

    @property
    def pair(self) -> tuple[str, str]:
        """The teacher's and the student's names."""
        return self.recipe.teacher.name, self.recipe.student.name

    @property
    def bytes(self) -> int:
        """Size of its checkpoints (the kept ones and the best) and of the exported student, without those of the losses."""
        parameters = count_parameters(create_outline(self.recipe.student.name))
        return 4 * parameters * (STATES * (self.recipe.train.keep_checkpoints + 1) + 1)


def jobs(cells: Sequence[Cell], seeds: int, out: Path) -> list[Job]:
    """The runs of these cells and of their teachers, each once, but for cells that no run measures."""
    found: dict[str, Job] = {}
    for cell, number in _wanted(cells, seeds):
        recipe = recipe_of(cell, out, number)
        found.setdefault(recipe.out, Job(cell, recipe, (Path(recipe.out) / RUN_SUMMARY).is_file()))
    return list(found.values())


def _wanted(cells: Sequence[Cell], seeds: int) -> Iterator[tuple[Cell, int]]:
    for cell in cells:
        if figure(cell) is None:
            continue
        if (theirs := teacher_cell(cell)) is not None:
            yield theirs, 0
        yield from ((cell, seed) for seed in range(runs_of(cell, seeds)))


def rates(machine: str) -> dict[tuple[str, str, str], float]:
    """Measured images per second of a machine, by (data set, teacher, student). RecipeError for a machine without any."""
    rows = rows_of("ledger.csv")
    if machine not in (known := list(dict.fromkeys(row["machine"] for row in rows))):
        raise RecipeError(f"--machine {machine}: ledger.csv has no rates of it, but of {', '.join(known)}")
    return {
        (row["dataset"], row["teacher"], row["student"]): float(row["images_per_second"])
        for row in rows
        if row["machine"] == machine
    }


def plan(cells: Sequence[Cell], seeds: int, out: Path, machine: str) -> str:
    """The cost of what is missing, a line for each pair; hours where the ledger has the pair's rate."""
    known, todo = rates(machine), [job for job in jobs(cells, seeds, out) if not job.done]
    rows = [["teacher", "student", "runs", "million images", "hours", "gigabytes"]]
    hours = 0.0
    for teacher, student in dict.fromkeys(job.pair for job in todo):
        mine = [job for job in todo if job.pair == (teacher, student)]
        images = sum(job.images for job in mine)
        rate = known.get((mine[0].cell.dataset, teacher, student), math.nan)
        hours += images / rate / 3600
        size = len(mine) * mine[0].bytes / 1e9
        cost = "unknown" if math.isnan(rate) else f"{images / rate / 3600:.1f}"
        rows.append([teacher, student, str(len(mine)), f"{images / 1e6:.1f}", cost, f"{size:.2f}"])
    total = sum(job.images for job in todo) / 1e6
    end = "unknown hours (measure the pairs with pipelines/benchmark.py)" if math.isnan(hours) else f"{hours:.1f} hours"
    return f"{table(rows, 'llrrrr')}\n\n{len(todo)} runs, {total:.1f} million images, {end} on {machine}"
