"""What makes a step faster without changing what it computes: compilers, and the means to see what they did."""

from __future__ import annotations

from collections import Counter

import torch
from torch._dynamo.utils import counters

from distill.models.backbone import Backbone
from distill.recipe import Recipe
from distill.report import Reporter


def compile_backbones(recipe: Recipe, student: Backbone, teacher: Backbone | None) -> None:
    """Compiles the forward (and backward) of the models that `train.compile` names, at their first call.

    In place: the modules, their parameters' names and their copies stay what they were, and evaluation, which sees batches
    of several sizes through another backbone over the same weights, stays eager.
    """
    wanted = {"student": student, "teacher": teacher}
    for name, backbone in wanted.items():
        if backbone is not None and recipe.train.compile in (name, "both"):
            # every training batch has one shape; a general one would be slower
            backbone.compile(mode=recipe.train.compile_mode, dynamic=False)


def compile_report() -> str:
    """What the compiler made of the models so far: how many graphs, and each reason for a break with its count."""
    graphs = counters["stats"]["unique_graphs"]
    breaks = Counter({reason.splitlines()[0]: count for reason, count in counters["graph_break"].items()})
    reasons = "".join(f"; {count} x {reason}" for reason, count in breaks.most_common(5))
    return f"compiled: {graphs} graphs, {sum(breaks.values())} graph breaks{reasons}"


def mark_step() -> None:
    """Tells CUDA graphs (`compile_mode: reduce-overhead`) that what the last step made may be overwritten."""
    torch.compiler.cudagraph_mark_step_begin()


class Observers:
    """Called after every step of this process: says what was compiled, once it is."""

    def __init__(self, recipe: Recipe, reporter: Reporter) -> None:
        self._compiles = recipe.train.compile != "none"
        self._reporter = reporter
        self._steps = 0

    def __call__(self) -> None:
        self._steps += 1
        if self._steps == 1 and self._compiles:
            self._reporter.say(compile_report())
