"""The papers' tables: every published number beside the recipe it means, the command that makes it, and ours.

    python pipelines/reproduce.py list --table sdd/T1             cells: published, ours, doubts
    python pipelines/reproduce.py show CELL > recipe.yaml         the complete recipe, and where each setting comes from
    python pipelines/reproduce.py run CELL --seeds 3              trains what is missing, teachers first; may be interrupted
    python pipelines/reproduce.py table sdd/T1                    OUT/sdd-T1.md and .csv: published, ours, difference
    python pipelines/reproduce.py plan sdd/T1 --machine h200      runs, images, hours and disk of what is missing

CELL is SOURCE/TABLE/TEACHER/STUDENT/METHOD, as `list` prints it, or a beginning of it, which means all such cells. The numbers
are in pipelines/published, whose README says what each column is. Runs and teachers are shared by cells of one recipe.
exit codes: 0 done, 1 some run failed, 2 the request was wrong, 75 stopped on request (give the same command again).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.agreement import Control
from distill.command_line import Parser, command
from distill.config import RecipeError
from distill.files import write_atomically
from distill.text_table import table
from pipelines.setup.child_run import add_launch_option, train_command
from pipelines.tables.cells import Cell, cells, named
from pipelines.tables.plan import plan
from pipelines.tables.report import as_csv, as_markdown, line
from pipelines.tables.runs import make
from pipelines.tables.show import shown

COMMAND = "python pipelines/reproduce.py"


def make_parser() -> Parser:
    """The parser of the five commands."""
    parser = Parser(prog="reproduce.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/published"), help="folder of runs and tables")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("list", help="cells with what is published and what is ours")
    for option, text in (("table", "SOURCE/TABLE"), ("method", "a method"), ("pair", "TEACHER/STUDENT")):
        one.add_argument(f"--{option}", default="*", metavar="PATTERN", help=f"only cells of {text}; * stands for anything")
    one = commands.add_parser("show", help="the complete recipe of a cell")
    one.add_argument("cell")
    one.add_argument("--short", action="store_true", help="leave out what is the default")
    one = commands.add_parser("run", help="make the missing runs of a cell or of several")
    one.add_argument("cell")
    one.add_argument("--seeds", type=int, default=1, help="runs of each cell, seeds from 0 on (default 1)")
    one.add_argument("--data", type=Path, metavar="DIR", help="folder of the shards `train` and `val` (default: the recipe's)")
    add_launch_option(one)
    one = commands.add_parser("table", help="write a table as Markdown and CSV")
    one.add_argument("cell", metavar="table")
    one = commands.add_parser("plan", help="what a table costs")
    one.add_argument("cell", metavar="table")
    one.add_argument("--seeds", type=int, default=3, help="runs of each cell (default 3)")
    one.add_argument("--machine", default="h200", help="a machine of pipelines/published/ledger.csv (default h200)")
    for one in commands.choices.values():  # behind the command too; the default is that of before it
        one.add_argument("--out", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


@command
def main(argv: Sequence[str]) -> int:
    """Answers one of the five requests. Raises RecipeError for a wrong one."""
    asked = make_parser().parse_args(argv)
    if getattr(asked, "seeds", 1) < 1:
        raise RecipeError(f"--seeds {asked.seeds}: one at least")
    if asked.command == "list":
        print(listing(asked))
    elif asked.command == "show":
        print(shown(the_cell(asked.cell), asked.out, COMMAND, asked.short), end="")
    elif asked.command == "run":
        return make(named(asked.cell), asked.seeds, asked.out, asked.data, train_command(asked.launch), Control().listen())
    elif asked.command == "table":
        write_table(asked.cell, asked.out)
    else:
        print(plan(named(asked.cell), asked.seeds, asked.out, asked.machine))
    return 0


def the_cell(name: str) -> Cell:
    """The one cell of a name. RecipeError where it means several."""
    found = named(name)
    if len(found) > 1:
        raise RecipeError(f"{name}: {len(found)} cells begin so; take one, such as {found[0].name}")
    return found[0]


def listing(asked: argparse.Namespace) -> str:
    """The cells that `list` asks for, a line each. RecipeError where there are none."""
    rows = [["cell", "published", "ours", "seeds", "remarks"]]
    for cell in cells():
        pair = f"{cell.teacher}/{cell.student}"
        texts = {cell.table_name: asked.table, cell.method: asked.method, pair: asked.pair}
        if all(fnmatchcase(text, pattern) for text, pattern in texts.items()):
            found = line(cell, asked.out)
            rows.append([cell.name, *(found[key] for key in ("published", "ours", "seeds", "remarks"))])
    if len(rows) == 1:
        known = ", ".join(sorted({cell.method.partition("@")[0] for cell in cells()}))
        raise RecipeError(
            f"list: no cell has --table {asked.table}, --method {asked.method} and --pair {asked.pair}; `list` alone shows all"
            f" tables and pairs; the methods are {known}; some have variants behind an @, such as NAME@*"
        )
    return f"{table(rows, 'lrrrl')}\n\n{len(rows) - 1} cells"


def write_table(name: str, out: Path) -> None:
    """Writes OUT/NAME.md and OUT/NAME.csv, and prints the first."""
    found, file = named(name), out / name.strip("/").replace("/", "-")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file.with_suffix(".csv"), as_csv(found, out))
    write_atomically(file.with_suffix(".md"), text := as_markdown(found, out))
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
