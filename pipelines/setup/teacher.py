"""The teacher before the first step: the recipe that trains it, and whether it is as good as the recipe says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.engine import pulse
from distill.evaluation import evaluate
from distill.losses import LOSSES
from distill.protocols import Needs
from distill.recipe import Optim, Recipe, Teacher
from distill.run import Run
from pipelines.setup.data import build_eval_loader, eval_spec
from pipelines.setup.models import Models


def losses_without_teacher(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The losses of a recipe that need no teacher, at full weight; cross-entropy where it has none."""
    alone = {name: {**entry, "weight": 1.0} for name, entry in recipe.loss.items() if LOSSES[name].teacher_needs is None}
    return alone or Recipe().loss


def optim_without_teacher(recipe: Recipe) -> Optim:
    """The recipe's optimiser, but SGD in the place of DOT: that is what DOT is where nothing distils."""
    optim = recipe.optim
    return dataclasses.replace(optim, name="sgd", options={}) if optim.name == "dot" else optim


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe that trains the teacher of `recipe` in OUT/teacher: the same data and settings, and of its losses those that
    need no teacher, at full weight."""
    wanted = recipe.teacher
    student = dataclasses.replace(
        recipe.student, name=wanted.name, initial_weights=wanted.initial_weights, model_kwargs=wanted.model_kwargs
    )
    return dataclasses.replace(
        recipe,
        out=str(Path(recipe.out) / "teacher"),
        teacher=dataclasses.replace(wanted, name="none", cache=""),
        augment=dataclasses.replace(recipe.augment, views=0),  # they are the student's: its teacher's outputs are kept by them
        student=student,
        loss=losses_without_teacher(recipe),
        optim=optim_without_teacher(recipe),
        train=dataclasses.replace(recipe.train, epochs=wanted.epochs or recipe.train.epochs),
    )


def evaluate_teacher(recipe: Recipe, run: Run, models: Models, val: ShardIndex) -> dict[str, float]:
    """The teacher's numbers on the validation shards, fed its own way and in its own precision; empty where nobody asks, and
    where it has no classifier that could be right or wrong.

    RecipeError where it is not as good as the recipe expects.
    """
    if models.teacher is None or not recipe.teacher.evaluate:
        return {}
    if models.teacher.backbone.num_classes < 1:
        check_unclassified(recipe.teacher)
        run.reporter.say(f"teacher {recipe.teacher.name}: not evaluated, for it has no classifier")
        return {}
    run.watch(0, "evaluating")
    spec = models.teacher.backbone.input_spec
    other = spec != eval_spec(recipe, models.student)
    loader = build_eval_loader(recipe, val, spec, run.accelerator) if other else run.eval_loader
    # of logits alone, and not compiled: evaluation has batches of two sizes
    found = evaluate(models.teacher.serving(Needs()), loader, run.accelerator, lambda: pulse(run))
    if other:
        loader.close()
    compared = check_top1(recipe.teacher, found["top1"])
    run.reporter.say(f"teacher {recipe.teacher.name}: top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}; {compared}")
    return found


def check_unclassified(teacher: Teacher) -> None:
    """RecipeError where the recipe expects a top-1 of a teacher that has no classifier."""
    if teacher.expected_top1 is not None:
        raise RecipeError(
            f"teacher.expected_top1 {teacher.expected_top1}: {teacher.name} has no classifier and no top-1; set it to null"
        )


def check_top1(teacher: Teacher, top1: float) -> str:
    """What a measured top-1 was compared with, for the log. RecipeError where it is off by more than the tolerance."""
    if teacher.expected_top1 is None:
        return "compared with nothing: teacher.expected_top1 does not name its top-1"
    expected = f"expected {teacher.expected_top1:.2f} +- {teacher.tolerance:.2f} (teacher.expected_top1)"
    if abs(top1 - teacher.expected_top1) > teacher.tolerance:
        raise RecipeError(
            f"teacher {teacher.name}: top-1 {top1:.2f} on the validation shards, {expected}; usual reasons: weights of another"
            " tag, mean/std, crop or interpolation of another recipe, another class order in the shards"
        )
    return expected
