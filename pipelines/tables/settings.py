"""The recipe that a cell means: its data set's protocol, its method's row of settings.csv, its networks."""

from __future__ import annotations

import json
from collections import defaultdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import RecipeError, load_recipe
from distill.losses import LOSSES
from distill.recipe import Recipe
from distill.yaml12 import parse_yaml
from pipelines.tables.cells import PUBLISHED, Cell, fits, rows_of

ALONE = "baseline"
TEACHER = "teacher"
LIGHT = ("mobilenetv2", "shufflenet")
"""Students that get the second of two learning rates (RepDistiller's rule, by name)."""


class PublishedSetting(NamedTuple):
    """One row of settings.csv, for one cell."""

    row: dict[str, str]
    file: Path
    """The protocol that the row changes."""

    @property
    def unknown(self) -> list[str]:
        """Recipe keys whose value no source gives; what the recipe says there is our reading."""
        return [key for key in self.row["unknown"].split("; ") if key]


def setting_of(cell: Cell) -> PublishedSetting:
    """The last row of settings.csv that fits: they go from the general to the particular. RecipeError where none does."""
    found = [row for row in _settings()[cell.method] if fits(row, cell, ("dataset", "source", "teacher", "student"))]
    if not found:
        raise RecipeError(f"{cell.name}: no row of settings.csv fits; add one")
    return PublishedSetting(found[-1], PUBLISHED / "protocols" / f"{found[-1]['protocol'] or cell.dataset}.yaml")


@cache
def _settings() -> dict[str, list[dict[str, str]]]:
    """The rows of each method, in the file's order."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows_of("settings.csv"):
        found[row["method"]].append(row)
    return found


@cache
def _networks() -> tuple[dict[str, str], ...]:
    return tuple(rows_of("networks.csv"))


def network(name: str) -> dict[str, Any]:
    """What is known of a network: `weights` (`trained` here, or `pretrained`), `model_kwargs`, `expected_top1`."""
    found = [row for row in _networks() if fnmatchcase(name, row["network"])]
    row = found[-1] if found else {"weights": "pretrained", "model_kwargs": "", "expected_top1": ""}
    return {
        "weights": row["weights"],
        "model_kwargs": json.loads(row["model_kwargs"] or "{}"),
        "expected_top1": float(row["expected_top1"]) if row["expected_top1"] else None,
    }


def is_measured_only(cell: Cell) -> bool:
    """Whether the cell is the accuracy of weights that somebody else trained."""
    return cell.method == TEACHER and network(cell.teacher)["weights"] == "pretrained"


def alone(cell: Cell) -> bool:
    """Whether its run has one network: the student alone, or a teacher that is trained here."""
    return cell.method == ALONE or (cell.method == TEACHER and not is_measured_only(cell))


def teacher_cell(cell: Cell) -> Cell | None:
    """The cell of this one's teacher where that is trained here; None where it needs no run of its own."""
    if alone(cell) or is_measured_only(cell) or network(cell.teacher)["weights"] != "trained":
        return None
    return cell._replace(method=TEACHER, metric="top1", value="", doubtful="", note="")


def folder(cell: Cell, out: Path) -> Path:
    """The folder of its runs, shared by all cells of the same recipe, in whatever table they are."""
    protocol = setting_of(cell).file.stem
    if alone(cell):
        return out / protocol / "alone" / (cell.teacher if cell.method == TEACHER else cell.student)
    source = setting_of(cell).row["source"]
    method = cell.method if source in ("*", "own") else f"{cell.method}.{source}"
    return out / protocol / f"{cell.teacher}--{cell.student}" / method


def recipe_of(cell: Cell, out: Path, seed: int = 0, data: Path | None = None) -> Recipe:
    """The whole recipe of a cell at one seed. The teacher is the one of seed 0, in its own folder.

    data: folder of `train` and `val`; None: as the protocol says. RecipeError as `setting_of`, and for a setting that makes no
    recipe.
    """
    setting = setting_of(cell)
    trained = cell.teacher if cell.method == TEACHER and alone(cell) else cell.student
    changes: dict[str, Any] = {
        "out": str(folder(cell, out) / f"seed{seed}"),
        "seed": seed,
        "student.name": trained,
        "student.model_kwargs": network(trained)["model_kwargs"],
        **numbers(setting, trained),
        **json.loads(setting.row["more"] or "{}"),
        "loss": json.loads(setting.row["loss"]),
    }
    if not alone(cell):
        changes |= teacher_of(cell, out)
    if is_measured_only(cell):
        changes["train.max_steps"] = 1  # the teacher is measured before the first step, and nothing else is wanted
    if data is not None:
        changes |= {"data.train": str(data / "train"), "data.val": str(data / "val"), "data.prepare": "none"}
    return load_recipe(setting.file, changes, LOSSES)


def numbers(setting: PublishedSetting, trained: str) -> dict[str, Any]:
    """The numbers of a row, by recipe key. Of two learning rates the second is that of the `LIGHT` networks."""
    keys = {
        "epochs": "train.epochs",
        "batch": "train.global_batch_size",
        "learning_rate": "optim.learning_rate",
        "weight_decay": "optim.weight_decay",
    }
    found = {}
    for column, key in keys.items():
        values = setting.row[column].split()
        if values:
            light = any(name in trained for name in LIGHT)
            found[key] = parse_yaml(values[-1 if light else 0])
    if setting.row["decay_epochs"]:
        found["schedule.decay_epochs"] = [float(epoch) for epoch in setting.row["decay_epochs"].split()]
    return found


def teacher_of(cell: Cell, out: Path) -> dict[str, Any]:
    """The recipe's teacher: weights of timm's hub, or those of the teacher's own run at seed 0."""
    known, theirs = network(cell.teacher), teacher_cell(cell)
    return {
        "teacher.name": cell.teacher,
        "teacher.weights": "pretrained" if theirs is None else str(folder(theirs, out) / "seed0" / "student"),
        "teacher.model_kwargs": known["model_kwargs"],
        "teacher.expected_top1": known["expected_top1"],
    }
