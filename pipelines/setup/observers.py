"""Observers of a run's steps: what the compiler made of the models, and a trace of some steps for a profiler's page."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch._dynamo.utils import counters
from torch.profiler import profile, schedule

from distill.config import RecipeError
from distill.recipe import Recipe
from distill.report import Reporter


def compile_report() -> str:
    """The compiler's work so far in one line: how many graphs, and each reason for a break with its count."""
    graphs = counters["stats"]["unique_graphs"]
    breaks = Counter({reason.splitlines()[0]: count for reason, count in counters["graph_break"].items()})
    reasons = "".join(f"; {count} x {reason}" for reason, count in breaks.most_common(5))
    return f"compiled: {graphs} graphs, {sum(breaks.values())} graph breaks{reasons}"


def mark_step() -> None:
    """Tells CUDA graphs (`compile_mode: reduce-overhead`) that what the last step made may be overwritten."""
    if "torch._inductor.cudagraph_trees" in sys.modules:  # a run without graphs does not wait 2 s for the import
        torch.compiler.cudagraph_mark_step_begin()


WARM_UP = 6
"""Steps before a profile: compilers, caches and the loader's first batches are no part of the usual step."""


class Observers:
    """The observers of one run, called after every step of this process (`Run.after_step`).

    After the first step they say what was compiled, if the recipe compiles; after every step they mark its end for CUDA graphs;
    and where the recipe asks for a profile they record `report.profile_steps` steps and write the trace to OUT/profile.
    RecipeError where the run's `steps` are too few for that.
    """

    def __init__(self, recipe: Recipe, reporter: Reporter, rank: int, steps: int) -> None:
        self._compiles = recipe.train.compile != "none"
        self._reporter = reporter
        self._steps = 0
        self._trace = Path(recipe.out) / "profile" / f"trace-rank{rank}.json"
        self._profile = None
        if recipe.report.profile_steps:
            needed = WARM_UP + recipe.report.profile_steps
            if steps < needed:
                raise RecipeError(
                    f"report.profile_steps: needs {needed} steps, {WARM_UP} before the profile; the run has {steps}"
                )
            # it starts after the first step, and its own warm-up is one step
            when = schedule(wait=WARM_UP - 2, warmup=1, active=recipe.report.profile_steps, repeat=1)
            self._profile = profile(schedule=when, on_trace_ready=self._write, profile_memory=True)

    def __call__(self) -> None:
        self._steps += 1
        if self._steps == 1 and self._compiles:
            self._reporter.say(compile_report())
        mark_step()
        if self._profile is not None:
            if self._steps == 1:
                self._profile.start()
            self._profile.step()

    def _write(self, found: profile) -> None:
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self._trace))
        self._reporter.say(f"profile of {self._trace.parent}: open it at chrome://tracing or in Perfetto")
