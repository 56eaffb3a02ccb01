"""What can be read off a loss's class before it is made: its options, their descriptions, and what is wrong with it.

The options of a loss are the keyword-only parameters of its constructor, so a new loss needs no change here.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model
from torch import nn

from distill.protocols import Criterion
from distill.recipe import TermSchedule

RUN_PARAMETERS = ("student", "teacher", "data")
"""What a run gives to a constructor that names it before `*`."""
TERM_OPTIONS = {f.name: f for f in dataclasses.fields(TermSchedule)}
"""The keys that every loss of a recipe has beside its own."""
LOG_NAMES = {"total", "loss", "eval"}
"""The log has the sum of all losses as `loss/total`, and a loss's statistics as `NAME/...`."""


def loss_options(loss: type) -> dict[str, tuple[Any, Any]]:
    """Recipe keys of a loss class: name -> (annotation, default or ...)."""
    hints = typing.get_type_hints(loss.__init__)  # type: ignore[misc]
    return {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in inspect.signature(loss).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }


def run_parameters(loss: type) -> list[str]:
    """The constructor parameters of a loss class that come from the run: those before `*`."""
    return [p.name for p in inspect.signature(loss).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def option_adapter(name: str, options: dict[str, tuple[Any, Any]]) -> TypeAdapter:
    """What validates a mapping of these options, and fills in their defaults."""
    fields: dict[str, Any] = dict(options)
    return TypeAdapter(create_model(name, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields))


@cache
def loss_adapter(loss: type) -> TypeAdapter:
    """What validates a loss's entry in a recipe: its own options and those of its term."""
    hints = typing.get_type_hints(TermSchedule, include_extras=True)
    term = {name: (hints[name], f.default) for name, f in TERM_OPTIONS.items()}
    return option_adapter(loss.__name__, {**loss_options(loss), **term})


def term_schedule(options: Mapping[str, Any]) -> tuple[TermSchedule, dict[str, Any]]:
    """An entry of the `loss` section split into its term's schedule and the options of its loss."""
    return (
        TermSchedule(**{k: v for k, v in options.items() if k in TERM_OPTIONS}),
        {k: v for k, v in options.items() if k not in TERM_OPTIONS},
    )


def summary(loss: type) -> str:
    """The first paragraph of a loss's docstring, on one line."""
    return " ".join(inspect.cleandoc(loss.__doc__ or "").partition("\n\n")[0].split())


def option_descriptions(loss: type) -> dict[str, str]:
    """The `Args` of a loss's docstring: parameter -> its description, on one line."""
    arguments = inspect.cleandoc(loss.__doc__ or "").partition("Args:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def check_loss(name: str, loss: type[Criterion]) -> None:
    """Raises ValueError, with one line, for an entry of the table of losses that a run could not use. Nothing is made."""
    problems = [*_name_problems(name), *_class_problems(loss)]
    if problems:
        raise ValueError(f"loss.{name}: {'; '.join(problems)}")


def _name_problems(name: str) -> Iterator[str]:
    # losses are the attributes of a ModuleDict, and their names are parts of recipe keys
    if not name.isidentifier():
        yield "the name must be made of letters, digits and _"
    elif name in LOG_NAMES or hasattr(nn.ModuleDict(), name):
        yield f"the name {name} is taken by the log or by torch.nn.ModuleDict; take another"


def _class_problems(loss: type[Criterion]) -> Iterator[str]:
    if not (isinstance(loss, type) and issubclass(loss, Criterion)):
        yield f"{getattr(loss, '__name__', repr(loss))} is no subclass of distill.protocols.Criterion; make it one"
        return
    yield from _constructor_problems(loss)
    taken = list(inspect.signature(loss.forward).parameters)[1:]
    if loss.forward is Criterion.forward:
        yield "it has no forward"
    elif taken != ["student", "teacher", "target"]:
        yield f"forward takes ({', '.join(taken)}); it must take (student, teacher, target), where target.labels are the labels"


def _constructor_problems(loss: type[Criterion]) -> Iterator[str]:
    parameters = inspect.signature(loss).parameters.values()
    if unnamed := [str(p) for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)]:
        yield f"its constructor takes {', '.join(unnamed)}; a run gives every parameter by its name"
    elif unknown := [key for key in run_parameters(loss) if key not in RUN_PARAMETERS]:
        given = ", ".join(RUN_PARAMETERS)
        yield f"asks the run for {', '.join(unknown)}; a run gives {given}; recipe keys stand after *"
    elif untyped := [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty]:
        yield f"option {', '.join(untyped)}: without a type; annotate it, as in `{untyped[0]}: float = 1.0`"
    else:
        yield from _option_problems(loss)


def _option_problems(loss: type[Criterion]) -> Iterator[str]:
    try:
        options = loss_options(loss)
    except NameError as error:
        yield f"an option's type cannot be found: {error}"
        return
    for key, (kind, default) in options.items():
        if key in TERM_OPTIONS:
            yield f"option {key}: every loss of a recipe has a key of this name; take another"
        if key.startswith("_"):
            yield f"option {key}: the name must not begin with _"
            continue
        try:
            adapter = option_adapter(loss.__name__, {key: (kind, default)})
            if default is not ...:
                adapter.validate_json(json.dumps({key: default}))
        except ValidationError as error:
            yield f"option {key}: its default {default!r}: {error.errors()[0]['msg']}"
        except Exception:  # whatever pydantic makes of the type, or json of the default
            yield f"option {key}: {kind} = {default!r}: a recipe holds numbers, text, true and false, tuples and Literal"
    yield from _build_student_problems(loss, options)


def _build_student_problems(loss: type[Criterion], options: dict[str, Any]) -> Iterator[str]:
    if loss.build_student is None:
        return
    given = dict.fromkeys(["student_images", "teacher_images", *options])
    try:
        inspect.signature(loss.build_student).bind(None, None, **given)
    except TypeError as error:
        yield f"build_student: {error}; it is a static method of (student, teacher, *, {', '.join(given)})"
