"""All methods on one pair by one protocol: the teacher once, the student alone, the student with each method; one table.

    python pipelines/compare_methods.py --recipe pipelines/recipes/digits/distilled.yaml --out runs/methods --seeds 3
    ... --methods kd,sp,crd --train.epochs 4     some methods; any option of pipelines/imagenet.py but those of losses

The losses and weights of each method are rows of pipelines/methods.yaml. Every run is pipelines/imagenet.py in a process of its
own, one after the other, with a recipe that is written beside the run's folder. The same command goes on where it stopped. All
methods get a seed before any gets the next one, so a table of fewer seeds can be had early.

A method that cannot serve the pair is a line of the table that says why; one that fails is named, and the others go on.
exit codes: 0 done, 1 some run failed, 2 the request was wrong, 75 stopped on request (give the same command again).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.agreement import Control
from distill.command_line import Parser, command
from distill.config import RecipeError, as_dict, load_recipe
from distill.files import write_atomically
from distill.losses import LOSSES
from distill.recipe import Recipe
from distill.text_table import markdown
from distill.yaml12 import parse_yaml
from pipelines.setup.arguments import add_import_option, parse
from pipelines.setup.child_run import REFUSED, add_launch_option, ended_badly, made, summary_of, train_command
from pipelines.setup.teacher import losses_without_teacher, optim_without_teacher, teacher_recipe

ROWS = Path(__file__).parent / "methods.yaml"
ALONE = "alone"
"""The row of the student alone."""
TOLD_APART = 2.0
"""Standard errors of the mean difference from which on two methods are called different."""


class Row(NamedTuple):
    """One method's finished runs, by seed; and why there are no more."""

    name: str
    summaries: dict[int, dict[str, Any]]
    problem: str = ""

    @property
    def extra_parameters(self) -> int:
        """Trained parameters of the student and of its losses together."""
        summary = next(iter(self.summaries.values()))
        return int(summary["student_parameters"] + summary["loss_parameters"])


@command
def main(argv: Sequence[str]) -> int:
    """Makes what runs are missing and writes the table, anew after each run. Raises RecipeError for a wrong request."""
    parser = Parser(prog="compare_methods.py", description=__doc__, epilog="all other options: pipelines/imagenet.py --help")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, from the recipe's seed on (default 3)")
    parser.add_argument("--methods", default="", metavar="A,B", help="only these rows (default: all)")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="losses of each method")
    add_launch_option(parser)
    add_import_option(parser)
    own, rest = parser.parse_known_args(argv)
    chosen = [option for option in rest if option.startswith("--loss.")]
    if chosen:
        raise RecipeError(f"{chosen[0]}: losses and weights are rows of {own.rows}; copy it, change it and give --rows")
    if own.seeds < 1:
        raise RecipeError(f"--seeds {own.seeds}: one at least")
    imports = [word for file in own.imports for word in ("--import", str(file))]
    base = parse([*rest, *imports], LOSSES).recipe
    if base.teacher.name == "none":
        raise RecipeError("teacher.name is 'none'; name the teacher of all methods with --teacher")
    rows = chosen_rows(own.rows, own.methods)
    return compare(base, rows, own.seeds, train_command(own.launch, own.imports))


def chosen_rows(path: Path, names: str) -> dict[str, dict[str, Any]]:
    """The rows of a file, those named or all. Raises RecipeError for a name that is none of them."""
    if not path.is_file():
        raise RecipeError(f"--rows {path}: no such file")
    rows: dict[str, dict[str, Any]] = parse_yaml(path.read_text())
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(rows)
    if unknown := [name for name in wanted if name not in rows]:
        raise RecipeError(f"--methods {unknown[0]}: no row of {path}, which has {', '.join(rows)}")
    return {name: rows[name] for name in wanted}


def recipes(base: Recipe, rows: Mapping[str, dict[str, Any]], seed: int) -> dict[str, Recipe]:
    """The recipe of each row at one seed, the student alone first. Raises RecipeError where a row is not a loss section."""
    out = Path(base.out)

    def of(name: str, **changes: Any) -> Recipe:
        changed = as_dict(dataclasses.replace(base, out=str(out / name / f"seed{seed}"), seed=seed))
        try:
            return load_recipe(None, {**changed, **changes}, LOSSES)
        except RecipeError as error:
            raise RecipeError(f"row {name}: {error}") from None

    nobody = {**as_dict(base)["teacher"], "name": "none"}
    optim = dataclasses.asdict(optim_without_teacher(base))
    found = {ALONE: of(ALONE, teacher=nobody, loss=losses_without_teacher(base), optim=optim)}
    return found | {name: of(name, loss=loss) for name, loss in rows.items()}


def compare(base: Recipe, rows: Mapping[str, dict[str, Any]], seeds: int, train: Sequence[str]) -> int:
    """Makes the runs and writes OUT/methods.md; 1 where some run failed. train: the words of the main command."""
    out, control = Path(base.out), Control().listen()
    numbers = range(base.seed, base.seed + seeds)
    planned = {seed: recipes(base, rows, seed) for seed in numbers}  # a wrong row is found before the first run
    base = with_teacher(base, train, control)
    found: dict[str, Row] = {name: Row(name, {}) for name in planned[base.seed]}
    failed = False
    for seed, name in ((seed, name) for seed in numbers for name in found):
        if found[name].problem:
            continue
        recipe = planned[seed][name]
        if recipe.teacher.name != "none":
            recipe = dataclasses.replace(recipe, teacher=base.teacher)
        code, said = made(recipe, train, control)
        if code:
            if name == ALONE:
                raise ended_badly("the student alone", code, said)
            failed = failed or code != REFUSED
            found[name] = found[name]._replace(
                problem=f"{'refused' if code == REFUSED else f'failed with exit code {code}'}: {said}"
            )
            print(f"{name}: {found[name].problem}", flush=True)
        else:
            found[name].summaries[seed] = summary_of(recipe)
            print(f"{name} seed {seed}: top-1 {found[name].summaries[seed]['top1']:.2f}", flush=True)
        write_atomically(out / "methods.md", report(list(found.values())))
    print("\n" + report(list(found.values())))
    return int(failed)


def with_teacher(base: Recipe, train: Sequence[str], control: Control) -> Recipe:
    """`base` with a path as its teacher's weights where the recipe says `train`: the teacher is trained, once for all."""
    if base.teacher.weights != "train":
        return base
    recipe = teacher_recipe(base)
    code, said = made(recipe, train, control)
    if code:
        raise ended_badly("the teacher", code, said)
    summary = summary_of(recipe)
    print(f"teacher {base.teacher.name}: top-1 {summary['top1']:.2f}", flush=True)
    weights = str(Path(recipe.out) / "student")
    # it has just been measured
    return dataclasses.replace(base, teacher=dataclasses.replace(base.teacher, weights=weights, evaluate=False))


def report(rows: Sequence[Row]) -> str:
    """The table in Markdown, and in sentences which methods are better and which are worse than none."""
    header = ["method", "top-1 %, mean", "deviation", "seeds", "difference to alone", "extra parameters", "seconds"]
    alone = rows[0]
    lines = [header, *(cells(row, alone) for row in rows if row.summaries)]
    return "\n".join([markdown(lines, "lrrrrrr"), "", *verdicts(rows, alone)]) + "\n"


def cells(row: Row, alone: Row) -> list[str]:
    """One line of the table; the deviation is that of single runs (n - 1), the seconds are the clock's."""
    top1 = [summary["top1"] for summary in row.summaries.values()]
    seconds = statistics.mean(summary["seconds"] for summary in row.summaries.values())
    deviation = f"{statistics.stdev(top1):.2f}" if len(top1) > 1 else "-"
    difference = "-"
    if row is not alone:
        mean, error = difference_to(row, alone)
        difference = f"{mean:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
    extra = "-" if row is alone else f"{row.extra_parameters - alone.extra_parameters:,}"
    return [row.name, f"{statistics.mean(top1):.2f}", deviation, str(len(top1)), difference, extra, f"{seconds:.0f}"]


def difference_to(row: Row, alone: Row) -> tuple[float, float]:
    """Mean difference of the runs of one seed, and its standard error; NaN for one seed."""
    pairs = [row.summaries[seed]["top1"] - alone.summaries[seed]["top1"] for seed in row.summaries if seed in alone.summaries]
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return round(statistics.mean(pairs), 6) + 0.0, error  # rounding of sums is no difference, and 0 has no sign


def verdicts(rows: Sequence[Row], alone: Row) -> Iterator[str]:
    """What the table shows, in sentences; runs that are missing, with the reason."""
    found = {row.name: difference_to(row, alone) for row in rows[1:] if row.summaries}
    known = {name: mean for name, (mean, error) in found.items() if abs(mean) > TOLD_APART * error}
    kinds = {
        "Better than the student alone": [name for name, mean in known.items() if mean > 0],
        "Worse than the student alone": [name for name, mean in known.items() if mean < 0],
        "Not told apart from it (less than two standard errors of the difference), better on average": [
            name for name, (mean, _) in found.items() if name not in known and mean >= 0
        ],
        "Not told apart from it, worse on average": [
            name for name, (mean, _) in found.items() if name not in known and mean < 0
        ],
    }
    for kind, names in kinds.items():
        yield f"* {kind}: {', '.join(names) or 'no method'}."
    for row in rows:
        if row.problem:
            yield f"* {row.name}: {row.problem}"


if __name__ == "__main__":
    sys.exit(main())
