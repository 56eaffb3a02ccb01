"""Runs side by side in the terminal: `python pipelines/compare.py RUN [RUN ...]`; pipelines/report.py draws the same facts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.command_line import Parser, command, requests
from pipelines.reporting.report import as_text
from pipelines.reporting.runs import Comparison


@command
def main(argv: Sequence[str]) -> None:
    """Prints the table and the facts. Raises RequestError where a folder holds no run."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    asked = parser.parse_args(argv)
    with requests():
        print(as_text(Comparison.read(asked.runs)))


if __name__ == "__main__":
    sys.exit(main())
