"""What the student learned, from whom, and where not: `python pipelines/report.py RUN [RUN ...] --out report.html`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.command_line import Parser, command, new_file, requests
from distill.errors import RequestError
from pipelines.reporting.evaluations import write_dumps
from pipelines.reporting.report import write
from pipelines.reporting.runs import Comparison

EPILOG = """
Give the run of the student alone beside the distilled one: what is gained is the difference. The dumps RUN/student.npz and
RUN/teacher.npz, which pipelines/evaluate.py --dump writes, give the panels about images and classes. docs/report.md explains.
"""


@command
def main(argv: Sequence[str]) -> None:
    """Writes the page and a Markdown summary beside it, and prints both paths."""
    parser = Parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--out", type=new_file, default=Path("report.html"), metavar="FILE", help="the page (%(default)s)")
    parser.add_argument("--published", type=float, metavar="TOP1", help="top-1 of the paper for this pair, in percent")
    parser.add_argument("--val", type=Path, metavar="DIR", help="where the validation shards lie now")
    parser.add_argument("--evaluate", action="store_true", help="write the dumps that are missing first")
    asked = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        raise RequestError("matplotlib is not installed, and draws the figures; say `pip install matplotlib`")
    if asked.out.suffix != ".html":
        raise RequestError(f"--out: {asked.out} is no page; let its name end in .html")
    beside = asked.out.with_suffix(".md")
    if beside.exists() and not asked.out.exists():
        raise RequestError(f"--out: {beside} is there, and the summary in words would replace it; give another name")
    with requests():
        comparison = Comparison.read(asked.runs, asked.published, asked.val)
        if asked.evaluate:
            for problem in write_dumps(comparison):
                print(problem, file=sys.stderr)
            comparison = Comparison.read(asked.runs, asked.published, asked.val)
        beside = write(comparison, asked.out)
    print(f"{asked.out} (in words: {beside})")


if __name__ == "__main__":
    sys.exit(main())
