"""The recipe's command line, each field as `--section.field VALUE`, and options that several commands have."""

from __future__ import annotations

import argparse
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill.command_line import Parser, requests, unknown_arguments
from distill.config import as_dict, load_recipe, recipe_fields
from distill.loss_options import TERM_OPTIONS, check_loss, loss_options, option_descriptions, summary
from distill.recipe import Recipe, TermSchedule
from distill.yaml12 import parse_yaml
from pipelines.setup.timm_args import convert_file, header

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "digits" / "distilled.yaml"

SHORT = {
    "--teacher": ("teacher.name", "timm name of the teacher, or `none` to train the student alone"),
    "--teacher-weights": ("teacher.weights", "`pretrained` (timm's hub), a path, or `train`"),
    "--student": ("student.name", "timm name of the student"),
    "--train": ("data.train", "folder of training shards"),
    "--val": ("data.val", "folder of validation shards"),
    "--out": ("out", "the run's folder"),
}

EPILOG = """
examples:
  accelerate launch pipelines/imagenet.py
      the digits distillation, on data that comes with scikit-learn
  accelerate launch --config_file accelerate_config.yaml pipelines/imagenet.py \\
      --recipe pipelines/recipes/imagenet/resnet34_resnet18_sdd_dkd.yaml \\
      --teacher resnet34.tv_in1k --student resnet18 --train data/imagenet/train --val data/imagenet/val --out runs/r34_r18
  ... --optim.learning_rate 0.05 --loss.sdd.scales "[1, 2, 4]" --loss.msdcrd null

values are YAML; `--loss.NAME null` drops a loss of the recipe, `--loss.NAME.weight W` adds one.
exit codes: 0 done, 1 the run failed, 2 the request was wrong, 75 stopped on request and saved (go on with --resume).
accelerate launch and torchrun turn each of these but 0 into 1; python pipelines/imagenet.py (one process) does not.
"""


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--import FILE`, which may be repeated; `import_files` runs what it collects in `imports`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="Python file that registers models with timm, or puts losses into distill.losses.LOSSES",
    )


def import_files(files: Sequence[Path]) -> None:
    """Runs the user's files. Raises RequestError for one that cannot be run, that adds a loss that no run could use, or that
    puts another loss in the place of one: a recipe's name would then mean something else without a word."""
    if not files:
        return
    from distill.losses import LOSSES
    from distill.models.build import import_models  # timm takes 2 s, which `compare.py` and every --help need not wait

    with requests():
        for file in files:
            before = dict(LOSSES)
            import_models(file)
            if replaced := [name for name, loss in before.items() if LOSSES.get(name) is not loss]:
                LOSSES.update(before)
                raise ValueError(f"--import {file}: replaces loss {', '.join(replaced)}; give your own another name")
        for name, loss in LOSSES.items():
            check_loss(name, loss)


class Request(NamedTuple):
    """A request for a run."""

    recipe: Recipe
    resume: bool


def _type_name(annotation: Any) -> str:
    return str(annotation).replace("typing.", "") if typing.get_origin(annotation) else annotation.__name__


def _add_option(group: Any, key: str, text: str, metavar: str = "VALUE") -> None:
    group.add_argument(f"--{key}", dest=key, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _described(text: str, kind: Any, default: Any) -> str:
    value = "required" if default is ... else f"default {default}"
    return f"{text} [{_type_name(kind)}, {value}]".lstrip().replace("%", "%%")


def _add_losses(parser: argparse.ArgumentParser, losses: Mapping[str, type]) -> None:
    """Adds each loss's options. Those that all losses have are shown once, under NAME."""
    every = parser.add_argument_group("loss.NAME", "options of every loss, beside its own")
    _add_option(every, "loss.NAME", "drop it", "null")
    hints = typing.get_type_hints(TermSchedule)
    for option, f in TERM_OPTIONS.items():
        _add_option(every, f"loss.NAME.{option}", _described(f.metadata["doc"], hints[option], f.default))
    for name, cls in losses.items():
        group = parser.add_argument_group(f"loss.{name}", textwrap.fill(summary(cls), 100))
        texts = option_descriptions(cls)
        for option, (kind, default) in loss_options(cls).items():
            _add_option(group, f"loss.{name}.{option}", _described(texts.get(option, ""), kind, default))
        for key in (f"loss.{name}", *(f"loss.{name}.{option}" for option in TERM_OPTIONS)):
            _add_option(group, key, argparse.SUPPRESS)


def make_parser(losses: Mapping[str, type]) -> Parser:
    """The parser of `pipelines/imagenet.py`; values stay text, `parse` reads them as YAML."""
    parser = Parser(
        usage="accelerate launch pipelines/imagenet.py [--recipe FILE] [--SECTION.FIELD VALUE]",
        description="Distils a timm student from a timm teacher, or trains the student alone.\n" + EPILOG,
    )
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help=f"YAML of one experiment (default: {DEFAULT_RECIPE.name} of digits)"
    )
    for option, (key, text) in SHORT.items():
        parser.add_argument(option, dest=key, metavar="VALUE", default=argparse.SUPPRESS, help=f"{text} (--{key})")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if there is one")
    add_import_option(parser)
    parser.add_argument(
        "--profile",
        dest="report.profile_steps",
        action="store_const",
        const="3",
        default=argparse.SUPPRESS,
        help="write a trace of three steps to OUT/profile (--report.profile_steps 3)",
    )
    parser.add_argument(
        "--from-timm-args",
        dest="timm_args",
        type=Path,
        metavar="FILE",
        help="args.yaml that timm's train.py saved: print it as a recipe, with what of it has no counterpart, and stop",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved recipe and stop")
    groups: dict[str, Any] = {}
    for key, kind, default, text, _ in recipe_fields():
        if f"--{key}" in SHORT:
            continue
        section = ".".join(key.split(".")[:-1]) or "run"
        group = groups.setdefault(section, parser.add_argument_group(section))
        _add_option(group, key, _described(text, kind, default))
    _add_losses(parser, losses)
    return parser


def _values(given: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the recipe's options, and a line for each that cannot be read."""
    texts = {field.key for field in recipe_fields() if field.kind is str}  # a folder named 2026 is no number
    values: dict[str, Any] = {}
    problems = []
    for key, text in given.items():
        try:
            values[key] = text if key in texts else parse_yaml(text)
        except yaml.YAMLError:
            problems.append(f"--{key}: {text!r} is not a YAML value; a list is written as [1, 2]")
    return values, problems


def parse(argv: Sequence[str], losses: Mapping[str, type]) -> Request:
    """The request of a command line, whose `--import` files are run first: a loss of theirs has options here.

    Raises RecipeError that lists all unknown options, unreadable values and problems of the recipe together. Prints and exits 0
    for --help, --print_config and --from-timm-args.
    """
    files = Parser(add_help=False)
    add_import_option(files)
    import_files(files.parse_known_args(argv)[0].imports)
    parser = make_parser(losses)
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    recipe_path, resume, print_config = given.pop("recipe"), given.pop("resume"), given.pop("print_config")
    timm_args = given.pop("timm_args")
    del given["imports"]
    overrides, unreadable = _values(given)
    others = [*unknown_arguments(unknown, parser), *unreadable]
    if timm_args is not None:
        if recipe_path is not None:
            others.append(f"--recipe {recipe_path}: --from-timm-args makes a recipe of its own; drop either")
        batch = overrides.get("train.global_batch_size")
        found = convert_file(timm_args, batch if isinstance(batch, int) and batch > 0 else None)  # else the recipe refuses it
        recipe = load_recipe(None, {**found.values, **overrides}, losses, others, source=timm_args)
        print(header(found, timm_args), end="")
    else:
        recipe = load_recipe(recipe_path or DEFAULT_RECIPE, overrides, losses, others)
    if print_config or timm_args is not None:
        yaml.safe_dump(as_dict(recipe), sys.stdout, sort_keys=False)
        raise SystemExit(0)
    return Request(recipe, resume)
