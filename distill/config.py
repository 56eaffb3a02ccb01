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
from distill.data.order import check_lanes, micro_batch_size
from distill.errors import RequestError
from distill.loss_options import TERM_OPTIONS, loss_adapter, loss_options, option_descriptions
from distill.recipe import LANE_WINDOW, LANES, Data, Recipe, TermSchedule, Train


class RecipeError(RequestError):
    """A recipe that cannot be served; the message names each problem and its remedy."""


_SCALARS = {
    "null": (["", *"~nN"], r"|~|null|Null|NULL"),
    "bool": ([*"tTfF"], r"true|True|TRUE|false|False|FALSE"),
    "int": ([*"-+0123456789"], r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": ([*"-+.0123456789"], r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
}
"""Kinds of a word without quotes, as in YAML 1.2: its first characters and its pattern. PyYAML knows YAML 1.1, in which
`1e-4` is text, `no` (a precision, here) is false, 1:30 is 90 and 017 is 15."""


class _Loader(yaml.SafeLoader):
    """A loader of plain data only: any other tag is an error, and so is a key that is given twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's own way)
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(f"tag:yaml.org,2002:{kind}" for kind in (*_SCALARS, "str", "seq", "map")))
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """PyYAML's mapping, without repeated keys: the first value would be lost without a word."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice; drop one", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, (_first, _pattern) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text; no tag can construct an object."""
    return yaml.load(text, Loader=_Loader)


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


INITIAL_SHARE = 0.01
"""Share of its initial weights from which an average is said not to have warmed up."""
OWNED = {
    "num_classes": "it is that of the data; leave it out",
    "in_chans": "images are RGB, grey ones too; leave it out",
    "features_only": "stages are found without it; leave it out",
    "out_indices": "stages are found without it; leave it out",
    "global_pool": "the head is read as the architecture has it; leave it out",
    "drop_rate": "use student.drop_rate",
    "drop_path_rate": "use student.drop_path_rate",
    **dict.fromkeys(("pretrained", "checkpoint_path", "state_dict"), "use student.initial_weights or teacher.weights"),
    **dict.fromkeys(("pretrained_cfg", "pretrained_cfg_overlay"), "use data.image_size, crop_fraction and interpolation"),
}
"""Arguments of timm.create_model that the recipe decides -> what to do instead."""


def owned_arguments(recipe: Recipe) -> Iterator[str]:
    """A line for each argument among `model_kwargs` that is not the user's to give."""
    for section, kwargs in (("student", recipe.student.model_kwargs), ("teacher", recipe.teacher.model_kwargs)):
        for key in OWNED.keys() & kwargs.keys():
            if (section, key, kwargs[key]) == ("teacher", "num_classes", 0):  # takes its classifier off
                continue
            if section == "teacher" and key.startswith("drop"):  # a teacher that is trained has no field for it
                continue
            more = ", or say 0 for a teacher without its classifier" if (section, key) == ("teacher", "num_classes") else ""
            yield f"{section}.model_kwargs: {key}: {OWNED[key]}{more}"


def combinations(recipe: Recipe, losses: Mapping[str, type]) -> Iterator[str]:
    """Each impossible combination of valid values, as one line."""
    alone = recipe.teacher.name == "none"
    for name in recipe.loss:
        if alone and getattr(losses[name], "teacher_needs", True) is not None:
            yield f"loss.{name}: needs a teacher, but teacher.name is 'none'; name one with --teacher, or drop this loss"
    builders = [name for name in recipe.loss if getattr(losses[name], "build_student", None) is not None]
    for name in builders[1:]:
        yield f"loss.{name}: trains a student of its own, and so does loss.{builders[0]}; drop either"
    if not recipe.loss:
        yield "loss: no loss is left; give at least one"
    if (
        recipe.loss
        and not alone
        and not builders
        and all(getattr(losses[name], "teacher_needs", True) is None for name in recipe.loss)
    ):
        names = ", ".join(recipe.loss)
        yield (
            f"teacher.name: {recipe.teacher.name}, but no loss reads a teacher ({names}); add one with --loss.NAME.weight 1,"
            " or say --teacher none"
        )
    yield from owned_arguments(recipe)
    if recipe.schedule.name == "step" and not recipe.schedule.decay_epochs:
        yield "schedule.decay_epochs: empty, but schedule.name is 'step'; give the epochs, such as [30, 60, 90]"
    if recipe.schedule.name != "step" and recipe.schedule.decay_epochs:
        yield f"schedule.decay_epochs: set, but schedule.name is {recipe.schedule.name!r}; it belongs to 'step'"
    try:
        recipe.augment.of_each_image()
    except ValueError as error:
        yield from (f"augment.{line}" for line in str(error).splitlines())
    try:
        micro_batch_size(recipe.train.global_batch_size, recipe.train.accumulate, world_size=1)
    except ValueError as error:
        yield f"train.accumulate: {error}"
    else:
        yield from shuffles(recipe.data, recipe.train)
    if recipe.augment.repeats > 1 and recipe.data.shuffle == "lanes":
        yield f"augment.repeats: {recipe.augment.repeats}, but lanes show every image once; say 1, or --data.shuffle global"


def shuffles(data: Data, train: Train) -> Iterator[str]:
    """A line for each option of the visiting order that does not fit the order, or has no effect on it."""
    if data.shuffle == "blocks" and not data.shuffle_block:
        yield "data.shuffle_block: 0, but data.shuffle is 'blocks'; give the number of samples of a block, such as 64"
    if data.shuffle != "blocks" and data.shuffle_block:
        yield f"data.shuffle_block: {data.shuffle_block}, but data.shuffle is {data.shuffle!r}; it belongs to 'blocks', say 0"
    if data.shuffle != "lanes" and (data.lanes, data.lane_window) != (LANES, LANE_WINDOW):
        yield f"data.lanes and data.lane_window: set, but data.shuffle is {data.shuffle!r}; they belong to 'lanes'"
    if data.shuffle == "lanes":
        try:
            check_lanes(data.lanes, train.global_batch_size, accumulate=train.accumulate)
        except ValueError as error:
            yield f"data.lanes: {error}"


def carried_over(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's tree in today's keys: `data.shuffle_block`, which chose the order by itself, says `data.shuffle` too."""
    data = tree.get("data")
    if isinstance(data, dict) and data.get("shuffle_block") and "shuffle" not in data:
        return {**tree, "data": {**data, "shuffle": "blocks"}}
    return tree


def doubts(recipe: Recipe, steps_per_epoch: int) -> Iterator[str]:
    """A line for each setting that has no effect, or not the usual one, in a run of this length; it may be meant."""
    epochs = float(recipe.train.epochs)
    if recipe.train.max_steps:
        epochs = min(epochs, recipe.train.max_steps / steps_per_epoch)
    schedule = recipe.schedule
    ends = f"the run ends after {epochs:g} epochs"
    if schedule.warmup_epochs >= epochs:
        yield f"schedule.warmup_epochs: {schedule.warmup_epochs:g}, and {ends}: the learning rate never reaches its peak"
    if late := [epoch for epoch in schedule.decay_epochs if epoch >= epochs]:
        yield f"schedule.decay_epochs: {', '.join(f'{epoch:g}' for epoch in late)} never come, {ends}"
    if recipe.augment.mix_off_epoch >= epochs:
        yield f"augment.mix_off_epoch: {recipe.augment.mix_off_epoch} never comes, {ends}"
    for name, entry in recipe.loss.items():
        term, _ = term_schedule(entry)
        if term.start_epoch >= epochs:
            yield f"loss.{name}.start_epoch: {term.start_epoch:g}, and {ends}: the term never counts"
        elif term.start_epoch + term.warmup_epochs > epochs:
            yield f"loss.{name}.warmup_epochs: {term.warmup_epochs:g}, and {ends}: the term never has its whole weight"
        if term.final_weight is not None and term.decay_start_epoch >= epochs:
            yield f"loss.{name}.decay_start_epoch: {term.decay_start_epoch:g}, and {ends}: final_weight has no effect"
    ema, steps = recipe.ema, round(epochs * steps_per_epoch)
    left = 0.0 if ema.warmup else ema.decay**steps
    if ema.enabled and left > INITIAL_SHARE:
        yield (
            f"ema.decay: {ema.decay:g} over {steps} steps leaves {left:.0%} of the initial weights in the average, which is"
            " evaluated and exported; say ema.warmup true, or a smaller decay"
        )


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


def term_schedule(options: Mapping[str, Any]) -> tuple[TermSchedule, dict[str, Any]]:
    """An entry of the `loss` section split into its term's schedule and the options of its loss."""
    return (
        TermSchedule(**{k: v for k, v in options.items() if k in TERM_OPTIONS}),
        {k: v for k, v in options.items() if k not in TERM_OPTIONS},
    )
