"""Cells of tables: the published numbers and our own, read from the CSV files beside `pipelines/published/README.md`."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

from distill.config import RecipeError

PUBLISHED = Path(__file__).parent.parent / "published"


class Cell(NamedTuple):
    """One number of a table: what it is of, and what its source prints."""

    source: str
    table: str
    dataset: str
    teacher: str
    student: str
    method: str
    metric: str
    value: str
    """As printed; empty where nobody has published it (our own tables)."""
    doubtful: str
    note: str

    @property
    def table_name(self) -> str:
        """The name of its table."""
        return f"{self.source}/{self.table}"

    @property
    def name(self) -> str:
        """Its name: SOURCE/TABLE/TEACHER/STUDENT/METHOD, and the metric where that is another than top-1."""
        metric = "" if self.metric == "top1" else f"/{self.metric}"
        return f"{self.table_name}/{self.teacher}/{self.student}/{self.method}{metric}"


def rows_of(file: str) -> list[dict[str, str]]:
    """The rows of one of the CSV files, by column."""
    with (PUBLISHED / file).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def fits(row: Mapping[str, str], cell: Cell, columns: Sequence[str]) -> bool:
    """Whether a row's patterns (`*` for anything) fit the cell in all of these columns."""
    return all(fnmatchcase(getattr(cell, column), row[column]) for column in columns)


@cache
def cells() -> tuple[Cell, ...]:
    """Every cell: those of the papers first, then our own."""
    return tuple(Cell(**row) for file in ("published.csv", "own.csv") for row in rows_of(file))


def named(name: str) -> list[Cell]:
    """The cells that a name means: one cell, or all whose names begin so (`sdd/T1`). RecipeError where there are none."""
    found = [cell for cell in cells() if cell.name == name] or [c for c in cells() if c.name.startswith(name.rstrip("/") + "/")]
    if not found:
        known = [*dict.fromkeys(cell.table_name for cell in cells()), *(cell.name for cell in cells())]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise RecipeError(f"{name}: no such cell or table; " + (f"did you mean {close[0]}?" if close else "see `list`"))
    return found


def doubts(cell: Cell) -> Iterator[str]:
    """Why the printed number is in doubt, and why no released code can have made it."""
    if cell.doubtful:
        yield f"doubtful: {cell.doubtful}"
    for row in _unreproducible():
        if fits(row, cell, ("source", "table", "dataset", "teacher", "student", "method")):
            yield f"not of released code: {row['reason']}"


@cache
def _unreproducible() -> tuple[dict[str, str], ...]:
    return tuple(rows_of("doubts.csv"))
