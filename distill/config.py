"""A recipe read from YAML and command-line overrides, strictly.

pydantic validates the whole tree in one go, so that every unknown key, wrong type and value out of range is reported together.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from pydantic import TypeAdapter, ValidationError

from distill.command_line import nearest
from distill.errors import RequestError
from distill.loss_options import TERM_OPTIONS, loss_adapter, loss_options, option_descriptions
from distill.recipe import Recipe
from distill.recipe_checks import combinations
from distill.yaml12 import parse_yaml


class RecipeError(RequestError):
    """A recipe that cannot be served; the message names each problem and its remedy."""


class RecipeField(NamedTuple):
    """One key of the recipe, outside of the `loss` section."""

    key: str
    kind: Any
    default: Any
    description: str
    may_change: bool
    """Whether a resumed run may say it differently."""


def recipe_fields(section: type = Recipe, prefix: str = "") -> Iterator[RecipeField]:
    """Every key below a section of the recipe, in order."""
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from recipe_fields(hints[f.name], f"{prefix}{f.name}.")
        elif f.name != "loss":
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            yield RecipeField(f"{prefix}{f.name}", hints[f.name], default, f.metadata["doc"], f.metadata["may_change"])


def _nearest(name: str, names: Sequence[str]) -> str:
    close = nearest(name, names)
    return f"did you mean {close!r}?" if close else f"allowed: {', '.join(sorted(names))}"


def _at(tree: Any, path: Sequence[Any]) -> Any:
    """The dataclass or type found by walking `path` from Recipe, to name its fields in a suggestion."""
    for key in path:
        if not dataclasses.is_dataclass(tree):
            return None
        tree = typing.get_type_hints(tree).get(str(key))
    return tree


UNION_MEMBER = re.compile(r"(?:literal|tuple|list|dict)\[.*|constrained-.*|int|float|str|bool|none")
"""A type that pydantic tried, as it names it inside of the place of the error: `stages.tuple[int, ...]`."""


def _explain(
    errors: Sequence[Any], prefix: str, names_at: typing.Callable, data: Any, described: Mapping[str, str]
) -> list[str]:
    """One line for each place: where several types are allowed, pydantic has an error for each of them.

    An error inside of one of several types says little of the others: the line is then about the whole value, and has the
    option's description.
    """
    found: dict[str, list[str]] = {}
    inside = {e["loc"][0] for e in errors if len(e["loc"]) > 2 and UNION_MEMBER.fullmatch(str(e["loc"][1]))}
    for error in errors:
        parts = [str(part) for part in error["loc"]]
        if parts[0] in inside and parts[0] in described:
            value = json.dumps(data[parts[0]], default=str)
            found[f"{prefix}.{parts[0]}: {value}: must be "] = [described[parts[0]]]
            continue
        if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            where = ".".join([prefix, *parts] if prefix else parts)
            found[f"{where}: unknown key, "] = [_nearest(parts[-1], names_at(error["loc"][:-1]))]
            continue
        parts = [part for place, part in enumerate(parts) if place == 0 or not UNION_MEMBER.fullmatch(part)]
        where = ".".join([prefix, *parts] if prefix else parts)
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}"
        found.setdefault(f"{where}: {json.dumps(error['input'], default=str)}: ", []).append(message)
    return [where + ", or ".join(messages) for where, messages in found.items()]


def _validate(
    adapter: TypeAdapter, data: Any, prefix: str, names_at: typing.Callable, described: Mapping[str, str] = MappingProxyType({})
) -> tuple[Any, list[str]]:
    # JSON mode: arrays may become tuples and integers floats, but nothing else is converted.
    try:
        return adapter.validate_json(json.dumps(data, default=str), strict=True), []
    except ValidationError as error:
        return None, _explain(error.errors(), prefix, names_at, data, described)


@cache
def _recipe_adapter() -> TypeAdapter:
    # 80 ms to make, and commands of several runs load many recipes
    return TypeAdapter(Recipe)


def _recipe_names(path: Sequence[Any]) -> list[str]:
    found = _at(Recipe, path)
    return [f.name for f in dataclasses.fields(found)] if dataclasses.is_dataclass(found) else []


def _resolve_losses(section: Mapping[str, Any], losses: Mapping[str, type]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every entry with its defaults filled in, and the problems found on the way."""
    resolved, problems = {}, []
    for name, options in section.items():
        name = str(name)
        if name not in losses:
            problems.append(f"loss.{name}: unknown key, {_nearest(name, list(losses))}")
        elif isinstance(options, dict):  # another type was reported with the rest of the tree
            names = [*loss_options(losses[name]), *TERM_OPTIONS]
            entry, found = _validate(
                loss_adapter(losses[name]),
                options,
                f"loss.{name}",
                lambda path, n=names: n if not path else [],
                option_descriptions(losses[name]),
            )
            problems += found
            resolved[name] = {} if found else entry.model_dump()
    return resolved, problems


def carried_over(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's tree in today's keys: `data.shuffle_block`, which chose the order by itself, says `data.shuffle` too."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("shuffle_block") and "shuffle" not in data:
        return {**tree, "data": {**data, "shuffle": "blocks"}}
    return tree


def merge(base: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """`base` with `value` set at `path`; a null at `loss.NAME` removes that loss."""
    head, *rest = path
    if not rest:
        if value is None and isinstance(base.get(head, {}), dict):
            return {k: v for k, v in base.items() if k != head}
        return {**base, head: value}
    inner = base.get(head)
    return {**base, head: merge(inner if isinstance(inner, dict) else {}, rest, value)}


def load_recipe(
    path: Path | None,
    overrides: Mapping[str, Any],
    losses: Mapping[str, type],
    others: Sequence[str] = (),
    source: Path | None = None,
) -> Recipe:
    """The checked recipe of a YAML file and `section.field -> value` overrides.

    source: the file of another format that overrides were read from, which problems then name.

    Raises RecipeError that lists every problem with the nearest valid name, before anything is built: first the `others` that
    the caller found, then unknown keys and wrong values. Combinations are looked at once all of these are right.
    """
    files = [str(file) for file in (path, source) if file is not None]
    title = " and ".join([*files, *(["the command line"] if overrides or others else [])])
    data: Any = {}
    if path is not None:
        if not path.is_file():
            raise RecipeError(f"--recipe {path}: no such file")
        try:
            data = parse_yaml(path.read_text()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not plain YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: holds a {type(data).__name__}; a recipe is a mapping of sections")
    for key, value in overrides.items():
        data = merge(data, key.split("."), value)
    data = carried_over(data)
    recipe, found = _validate(_recipe_adapter(), data, "", _recipe_names)
    problems = [*others, *found]
    section = data.get("loss", Recipe().loss)
    if isinstance(section, dict):
        resolved, found = _resolve_losses(section, losses)
        problems += found
    if not problems:
        recipe = dataclasses.replace(recipe, loss=resolved)
        problems = list(combinations(recipe, losses))
    if len(problems) == 1:
        raise RecipeError(problems[0] if others else f"{title}: {problems[0]}")
    if problems:
        raise RecipeError("\n".join([f"{len(problems)} problems in {title}", *(f"  {p}" for p in problems)]))
    return recipe


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, in the order of its sections."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))
