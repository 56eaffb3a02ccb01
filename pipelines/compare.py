"""Finished runs side by side: `python pipelines/compare.py RUN [RUN ...]` prints one table of their summaries."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.command_line import Parser, RequestError, command
from pipelines.measure.tables import table


def row(folder: Path, summary: dict[str, Any]) -> list[str]:
    """One run: its folder's name, student, teacher and figures as they stand in summary.json."""
    teacher = summary["teacher"] if summary["teacher"] != "none" else "-"
    return [
        folder.name,
        summary["student"],
        teacher,
        f"{summary['top1']:.2f}",
        f"{summary['best_top1']:.2f}",
        f"{summary['images_per_second']:.0f}",
        f"{summary['seconds']:.1f}",
    ]


def read_row(folder: Path) -> list[str]:
    """The row of a run's folder. Raises RequestError where its summary is not one of this version."""
    try:
        return row(folder, json.loads((folder / "summary.json").read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{folder / 'summary.json'}: no summary of this version ({error!r}); leave it out") from error


@command
def main(argv: Sequence[str]) -> None:
    """Prints the table. Raises RequestError where a folder holds no finished run."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    folders: list[Path] = parser.parse_args(argv).runs
    missing = [str(f) for f in folders if not (f / "summary.json").is_file()]
    if missing:
        raise RequestError(f"no summary.json in {', '.join(missing)}: not a finished run")
    rows = [read_row(f) for f in folders]
    print(table([["run", "student", "teacher", "top-1 %", "best %", "images/s", "seconds"], *rows], "lrrrrrr"))


if __name__ == "__main__":
    sys.exit(main())
