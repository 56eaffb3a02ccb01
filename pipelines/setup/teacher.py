"""The teacher before the first step: in the recipe's precision, as good as somebody vouches for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from distill.batch_transform import to_pixels
from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.engine import pulse
from distill.evaluation import evaluate
from distill.models.backbone import Backbone
from distill.models.quantize import EIGHT_BITS
from distill.models.region_logits.layout import TimmModel
from distill.models.teacher import ServedTeacher
from distill.protocols import Batch, Loader, Needs
from distill.recipe import Recipe, Teacher
from distill.run import Run
from pipelines.setup.arguments import requests
from pipelines.setup.data import build_eval_loader, eval_spec
from pipelines.setup.models import Models
from pipelines.setup.preflight import check_teacher, expectation


class LabelledBy:
    """A `Loader` whose labels are what `label` says of its images: top-1 on it is the agreement with that."""

    def __init__(self, loader: Loader, label: Callable[[Tensor], Tensor]) -> None:
        self.num_samples, self.batches_per_epoch = loader.num_samples, loader.batches_per_epoch
        self._loader, self._label = loader, label

    @property
    def bad_samples(self) -> list[int]:
        """The loader's own."""
        return self._loader.bad_samples

    def state(self) -> dict[str, Any]:
        """The loader's own."""
        return self._loader.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """The loader's own."""
        self._loader.restore(state)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The loader's batches with the other labels."""
        for batch in self._loader.epoch(epoch, start):
            yield batch._replace(labels=self._label(batch.images)) if len(batch.labels) else batch

    def close(self) -> None:
        """The loader's own."""
        self._loader.close()


def prepare_teacher(recipe: Recipe, run: Run, models: Models, val: ShardIndex) -> dict[str, float]:
    """The teacher in the recipe's precision, and its own numbers on the validation shards, fed its own way.

    RecipeError where it is not as good as the recipe expects, or where its int8 or float8 weights decide differently too often.
    """
    if models.teacher is None or models.served is None:
        return {}
    asked, accelerator, spec = recipe.teacher, run.accelerator, models.teacher.input_spec
    quantised = asked.precision in EIGHT_BITS
    if not (asked.evaluate or quantised):
        lower_teacher(recipe, models, accelerator)
        return {}
    with requests():
        expected = expectation(asked, spec, val.class_names, val.num_samples) if asked.evaluate else None
    # while the model can still be probed; `own` shares the weights of the run's teacher, `before` keeps those it has now
    own = beside(models.served, models.teacher, models.teacher.model)
    before = beside(models.served, models.teacher, copy.deepcopy(models.teacher.model)) if quantised else None
    lower_teacher(recipe, models, accelerator)
    own.dtype = models.served.dtype
    run.watch(0, "evaluating")
    other = spec != eval_spec(recipe, models.student)
    loader = build_eval_loader(recipe, val, spec, accelerator) if other else run.eval_loader
    found: dict[str, float] = {}
    if asked.evaluate:
        found = evaluate(own, loader, accelerator, lambda: pulse(run))
        compared = check_teacher(asked.name, found["top1"], expected)
        run.reporter.say(f"teacher {asked.name}: top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}; {compared}")
    if before is not None:
        before.lower("bf16", accelerator.device)
        labelled = LabelledBy(loader, partial(top1_of, before, accelerator))
        agreement = evaluate(own, labelled, accelerator, lambda: pulse(run))["top1"]
        run.reporter.say(check_agreement(asked, agreement, own.dtype))
    if other:
        loader.close()
    return found


def beside(served: ServedTeacher, teacher: Backbone, model: TimmModel) -> ServedTeacher:
    """A teacher that gives logits only, over the weights of `model`; not compiled, for evaluation has batches of two sizes."""
    return ServedTeacher(teacher.serving(Needs(), model).to(teacher.mean.device), served.memory_format)


def lower_teacher(recipe: Recipe, models: Models, accelerator: Accelerator) -> None:
    """Puts the teacher into the recipe's precision, in place, and says how much of it was quantised."""
    if models.served is None:
        return
    quantised = models.served.lower(recipe.teacher.precision, accelerator.device)
    if quantised is not None:
        accelerator.print(
            f"teacher {recipe.teacher.name}: {recipe.teacher.precision} in its Linear layers, {quantised.layers} of"
            f" {quantised.of_layers} layers with weights, {quantised.share:.1%} of its parameters"
        )


def top1_of(teacher: ServedTeacher, accelerator: Accelerator, images: Tensor) -> Tensor:
    """The classes that the teacher decides for: images uint8 [B, H, W, 3] -> int64 [B]."""
    with torch.no_grad(), accelerator.autocast():
        return teacher(to_pixels(images)).logits.argmax(dim=1)


def check_agreement(asked: Teacher, percent: float, dtype: torch.dtype | None) -> str:
    """The agreement in words, for the log. RecipeError where it is below what the recipe asks for."""
    reference = "in bf16" if dtype is torch.bfloat16 else "unquantised (bf16 is not usable here)"
    found = f"teacher {asked.name}: top-1 agreement of {asked.precision} with the teacher {reference} {percent:.2f} %"
    if percent < asked.least_agreement:
        raise RecipeError(
            f"{found}, teacher.least_agreement asks for {asked.least_agreement:.2f} %; take --teacher.precision bf16"
        )
    return f"{found}, at least {asked.least_agreement:.2f} % asked"
