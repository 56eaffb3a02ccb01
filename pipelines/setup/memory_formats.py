"""Which memory format each model runs in: the recipe's, or with `train.channels_last: auto` the one that is faster here."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from distill.models.backbone import Backbone
from distill.recipe import Recipe
from pipelines.measure.timeline import Timeline
from pipelines.setup.run_folder import recorded

REPETITIONS = 20
SECONDS = 3.0
"""Of both formats of one model together, roughly: a model that takes longer is run twice in each, and the second run counts."""
WARM_UP = 2
MANIFEST = "channels_last"
"""The manifest's name for the decision, which a resumed run takes over: the formats sum in different orders."""


class Formats(NamedTuple):
    """Whether a model and its images are in channels_last."""

    student: bool
    teacher: bool

    def names(self) -> list[str]:
        """The models that are."""
        return [name for name, chosen in self._asdict().items() if chosen]


def memory_format(channels_last: bool) -> torch.memory_format:
    """PyTorch's name for it."""
    return torch.channels_last if channels_last else torch.contiguous_format


Chooser = Callable[[Recipe, Backbone, Backbone | None], Formats]


def as_asked(recipe: Recipe, student: Backbone, teacher: Backbone | None) -> Formats:
    """What the recipe says; `auto` is not measured here, and channels_last."""
    asked = recipe.train.channels_last is not False
    return Formats(asked, asked)


def choose_formats(
    recipe: Recipe, student: Backbone, teacher: Backbone | None, *, accelerator: Accelerator, batch: int
) -> Formats:
    """The formats of this run, the same on all processes: the recipe's; those that the run in its folder began with; or what
    the main process measures. A collective where the recipe says `auto`."""
    if recipe.train.channels_last != "auto":
        return as_asked(recipe, student, teacher)
    decision: list[tuple[Formats, str] | None] = [None]
    if accelerator.is_main_process:
        before = recorded(Path(recipe.out), MANIFEST)
        measured = partial(measure_formats, accelerator, student, teacher, batch)
        decision = [measured() if before is None else (Formats(**before), "as the run began")]
    broadcast_object_list(decision)
    assert decision[0] is not None
    found, said = decision[0]
    accelerator.print(f"channels_last: {' and '.join(found.names()) or 'no model'} ({said})")
    return found


def measure_formats(accelerator: Accelerator, student: Backbone, teacher: Backbone | None, batch: int) -> tuple[Formats, str]:
    """The faster formats and the figures; channels_last where a batch does not fit: the first step will say what would."""
    try:
        ours = Faster(accelerator, student, batch, backward=True)
        if teacher is None:
            return Formats(ours.channels_last, ours.channels_last), f"student {ours}"
        theirs = Faster(accelerator, teacher, batch, backward=False)
    except torch.OutOfMemoryError:
        return Formats(True, True), "not measured, a batch does not fit into the memory"
    return Formats(ours.channels_last, theirs.channels_last), f"student {ours}; teacher {theirs}"


class Faster:
    """The faster format of one model as it is now, on random images, under the run's precision and without compilers.

    A copy is measured, in turn in both formats: weights, gradients, statistics and the state of the generators stay.
    """

    def __init__(self, accelerator: Accelerator, backbone: Backbone, batch: int, backward: bool) -> None:
        line = Timeline(accelerator.device)
        spec = backbone.input_spec
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            images = torch.rand(batch, 3, spec.height, spec.width, device=accelerator.device)
            passes = [_passes(accelerator, backbone.model, images, chosen, backward) for chosen in (True, False)]
            self.milliseconds = _in_turn(passes, line)

    @property
    def channels_last(self) -> bool:
        """Where nothing tells them apart it is channels_last, in which the loaders' images come."""
        return self.milliseconds[0] <= 1.02 * self.milliseconds[1]

    def __str__(self) -> str:
        return f"{self.milliseconds[0]:.1f} ms with and {self.milliseconds[1]:.1f} ms without"


def _passes(
    accelerator: Accelerator, model: nn.Module, images: torch.Tensor, channels_last: bool, backward: bool
) -> Callable[[], None]:
    """A forward pass of a copy of the model in this format, with the backward pass where it has one."""
    chosen = memory_format(channels_last)
    own = copy.deepcopy(model).to(memory_format=chosen)
    for module in own.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # in training it asks the other processes, which measure nothing
    given = images.contiguous(memory_format=chosen)

    def run() -> None:
        with torch.set_grad_enabled(backward), accelerator.autocast():
            logits = own(given)
        if backward:
            logits.float().sum().backward()

    return run


def _in_turn(passes: list[Callable[[], None]], line: Timeline) -> list[float]:
    """Median milliseconds of each, measured in turn so that a slow spell of the machine hits all."""
    times: list[list[float]] = []
    while len(times) < WARM_UP + REPETITIONS and (len(times) < 2 or sum(map(sum, times)) < 1000 * SECONDS):
        times.append([_milliseconds(run, line) for run in passes])
    counted = times[min(WARM_UP, len(times) - 1) :]
    return [statistics.median(each) for each in zip(*counted, strict=True)]


def _milliseconds(run: Callable[[], None], line: Timeline) -> float:
    line.begin_step()
    run()
    line.end()
    return sum(line.cut()[0].values())
