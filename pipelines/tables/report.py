"""A table beside ours: Markdown for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.text_table import markdown
from pipelines.tables.cells import Cell, doubts
from pipelines.tables.runs import UNMEASURED, figure, finished_runs, measured
from pipelines.tables.settings import setting_of

HEADER = (
    "teacher",
    "student",
    "method",
    "metric",
    "published",
    "ours",
    "deviation",
    "seeds",
    "difference",
    "hardware",
    "hours",
    "remarks",
)
NOT_RUN = "not run"


def line(cell: Cell, out: Path) -> dict[str, str]:
    """One line of a table. The deviation is that of single runs (n - 1); hours are the mean run's, without its teacher's."""
    runs = finished_runs(cell, out)
    values = measured(cell, runs)
    found = dict.fromkeys(HEADER, "")
    found |= {key: getattr(cell, key) for key in ("teacher", "student", "method", "metric")}
    found |= {"published": cell.value, "ours": NOT_RUN, "seeds": str(len(values)), "remarks": "; ".join(remarks(cell))}
    if values:
        mean = statistics.mean(values)
        found["ours"] = f"{mean:.2f}"
        found["deviation"] = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        found["difference"] = f"{mean - float(cell.value):+.2f}" if cell.value else ""
        found["hardware"] = "; ".join(dict.fromkeys(hardware(run.manifest) for run in runs))
        found["hours"] = f"{statistics.mean(run.summary['seconds'] for run in runs) / 3600:.2f}"
    return found


def hardware(manifest: Mapping[str, Any]) -> str:
    """The device of a run, and how many: hours say nothing without it."""
    count, device = manifest["world_size"], manifest["device"]
    return f"{count} x {device}" if count > 1 else str(device)


def remarks(cell: Cell) -> list[str]:
    """Doubts about the number, what no source gives, and that no run measures it where none does."""
    unknown = setting_of(cell).unknown
    notes = [f"in no source: {', '.join(unknown)}"] if unknown else []
    return [*doubts(cell), *notes, *([UNMEASURED] if figure(cell) is None else [])]


def as_markdown(cells: Sequence[Cell], out: Path) -> str:
    """The lines of these cells as a Markdown table."""
    rows = [HEADER, *([*line(cell, out).values()] for cell in cells)]
    return markdown(rows, "l" * len(HEADER)) + "\n"


def as_csv(cells: Sequence[Cell], out: Path) -> str:
    """The lines of these cells as CSV."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(line(cell, out) for cell in cells)
    return stream.getvalue()
