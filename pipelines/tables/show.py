"""A cell's recipe as a file, whole or without what is the default, under comments that say where each setting comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from distill.config import as_dict, load_recipe
from distill.losses import LOSSES
from distill.recipe import Augment, Recipe
from pipelines.tables.cells import PUBLISHED, Cell, doubts
from pipelines.tables.settings import recipe_of, setting_of, teacher_cell

INDENT = "#" + 12 * " "


def shortened(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data without the keys that have their default value; it loads as the whole one does."""
    # what the losses ask of a teacher and of views is checked in the defaults too, so they have the recipe's
    views = {name: getattr(recipe.augment, name) for name in ("repeats", "plain_repeats")}
    asked = {"loss": {name: {} for name in recipe.loss}, "teacher.name": recipe.teacher.name, "augment": views}
    defaults = as_dict(load_recipe(None, asked, LOSSES))
    del defaults["teacher"]["name"]
    defaults["augment"] |= {name: getattr(Augment, name) for name in views}
    return _without(as_dict(recipe), defaults)


def _without(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values that differ; sections that hold none are left out."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            value = _without(value, defaults[key])
            if value or key in LOSSES:
                found[key] = value
        elif value != defaults.get(key):
            found[key] = value
    return found


def shown(cell: Cell, out: Path, command: str, short: bool = False) -> str:
    """The recipe as YAML that can be saved and run alone, under comments that say where each setting comes from.

    short: as `shortened`.
    """
    setting, theirs = setting_of(cell), teacher_cell(cell)
    row = setting.row
    expected = f"{cell.metric} {cell.value or 'unpublished'}" + (f" ({cell.note})" if cell.note else "")
    unmeasured = f"Measured:  not run when this was written; `{command} table {cell.source}/{cell.table}` prints what was run"
    lines = [
        f"Cell:      {cell.name}",
        f"Command:   {command} run {cell.name}",
        f"Expected:  {expected}",
        unmeasured if short else "",
        *(f"Doubt:     {doubt}" for doubt in doubts(cell)),
        f"Source:    {row['origin']}" + (f"; {row['note']}" if row["note"] else ""),
        f"Unknown:   {'; '.join(setting.unknown)} (in no source; the values here are our reading)" if setting.unknown else "",
        f"Differs:   {row['differs']}" if row["differs"] else "",
        f"Teacher:   made by `{command} run {theirs.name}`" if theirs else "",
        f"Protocol:  {setting.file.relative_to(PUBLISHED)}",
    ]
    wrapped = [textwrap.fill(f"# {line}", 118, subsequent_indent=INDENT, break_on_hyphens=False) for line in lines if line]
    head = "\n".join([*wrapped, *protocol_head(setting.file)])
    recipe = recipe_of(cell, out)
    values = shortened(recipe) if short else as_dict(recipe)
    return head + "\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=90)


def protocol_head(file: Path) -> list[str]:
    """The lines of comments with which a protocol begins."""
    lines = file.read_text().splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
