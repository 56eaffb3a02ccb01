"""Recipe -> objects: the run is put together here, from the models, loaders and criteria of the other rooms."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm

from distill.agreement import Control
from distill.average import Average
from distill.checkpoint import Checkpoints
from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.distiller import Distiller
from distill.loss_options import term_schedule
from distill.models.recompute import set_activation_checkpointing, unchanged_statistics
from distill.nonfinite import Guard
from distill.optim import create_optimizer, learning_rate_schedule, weight_schedule
from distill.recipe import Recipe
from distill.report import Reporter, say
from distill.run import LoopSettings, Run, Transform
from distill.seeds import derive_seed, seed_all
from pipelines.setup.data import (
    Splits,
    build_eval_loader,
    build_train_loader,
    build_transform,
    data_facts,
    eval_spec,
    train_order,
)
from pipelines.setup.models import Models, build_classifier, build_models, check_precision, compile_backbones
from pipelines.setup.observers import Observers
from pipelines.setup.teacher_cache import open_cache


def build_settings(recipe: Recipe, index: ShardIndex) -> LoopSettings:
    """The numbers of the loop."""
    train = recipe.train
    return LoopSettings(
        epochs=train.epochs,
        steps_per_epoch=train_order(recipe, index).steps_per_epoch,
        global_batch_size=train.global_batch_size,
        accumulate=train.accumulate,
        max_steps=train.max_steps,
        clip_gradient_norm=train.clip_gradient_norm,
        skip_nonfinite=train.skip_nonfinite,
        evaluate_every=train.evaluate_every,
        checkpoint_every=train.checkpoint_every,
        checkpoint_minutes=train.checkpoint_minutes,
        log_every=recipe.report.log_every,
        gradient_shares=recipe.report.gradient_shares,
    )


def rehearse(recipe: Recipe, accelerator: Accelerator, splits: Splits) -> None:
    """Builds everything that the main run needs but the teacher's weights, and throws it away: what is wrong with a request is
    said before days are spent on training its teacher."""
    if recipe.teacher.cache:
        raise RecipeError(
            "teacher.weights: train; a cache is of a teacher that exists: train it first, without teacher.cache, then give"
            " --teacher-weights OUT/teacher/student"
        )
    rehearsed = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, weights="random"))
    data = data_facts(recipe, splits.train, accelerator.num_processes)
    check_precision(recipe.teacher.precision, accelerator.device)
    models = build_models(rehearsed, splits.train.num_classes, data, torch.device("cpu"))
    build_optimizer(rehearsed, build_distiller(rehearsed, models))


def build_optimizer(recipe: Recipe, distiller: Distiller) -> torch.optim.Optimizer:
    """The recipe's optimiser over the student and the criteria's projectors."""
    optim = recipe.optim
    return create_optimizer(
        distiller,
        optim.name,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        decay_bias_and_norm=optim.decay_bias_and_norm,
        layer_decay=optim.layer_decay,
        layer_decay_min_scale=optim.layer_decay_min_scale,
        options=optim.options,
    )


def build_distiller(recipe: Recipe, models: Models) -> Distiller:
    """The module that DDP will wrap."""
    schedules = {name: weight_schedule(**dataclasses.asdict(term_schedule(entry)[0])) for name, entry in recipe.loss.items()}
    join = () if models.teacher is None else (models.teacher.join,)
    return Distiller(models.student, models.criteria, schedules, *join)


def build_guard(
    recipe: Recipe, accelerator: Accelerator, distiller: Distiller, optimizer: Any, waiting: Callable[[], None]
) -> Guard:
    """The guard of the steps; it keeps BatchNorm's statistics where the recipe lets a run go on after a poisoned step."""
    norms = [module for module in distiller.modules() if isinstance(module, _BatchNorm)] if recipe.train.skip_nonfinite else []
    statistics = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    return Guard(optimizer, accelerator.scaler, partial(accelerator.reduce, reduction="sum"), statistics, waiting)


def recomputing(recipe: Recipe, models: Models, accelerator: Accelerator) -> Callable[[], AbstractContextManager[None]]:
    """What a backward pass runs in: the student recomputes its activations in it, where the recipe asks for that."""
    if not recipe.student.checkpoint_activations:
        return nullcontext
    before, after = set_activation_checkpointing(models.student)
    say(accelerator, f"activations of one image: {after / 1e6:.1f} MB instead of {before / 1e6:.1f} MB (float32)")
    return partial(unchanged_statistics, models.student.model)


def unchanged(transform: Transform) -> Transform:
    """The transform itself."""
    return transform


def build(
    recipe: Recipe,
    accelerator: Accelerator,
    splits: Splits,
    control: Control,
    watch: Callable[[int, str], None] = lambda step, phase: None,
    waiting: Callable[[], None] = lambda: None,
    around_transform: Callable[[Transform], Transform] = unchanged,
) -> tuple[Run, Models]:
    """The run that a recipe describes, at step 0; `control` and `watch` as in `Run`, `waiting` as in `Guard`.

    around_transform: gets the transform of batches and gives the one that the run calls, which may look at what it makes.

    The order of initialisation matters:
    1. seed; 2. models and criteria, on the device, with their BatchNorm policy; 3. the average, a copy of the plain
    student before anything wraps it; 4. the optimiser over what is trained; 5. Accelerate wraps both; 6. compilers, which work
    at the first call. Restoring comes after.
    """
    seed_all(derive_seed(recipe.seed, "initialisation"))
    data = data_facts(recipe, splits.train, accelerator.num_processes)
    models = build_models(recipe, splits.train.num_classes, data, accelerator.device)
    for remark in models.remarks:
        say(accelerator, remark)
    if recipe.train.overlap_teacher and accelerator.device.type != "cuda":
        say(accelerator, "train.overlap_teacher: no effect here, it needs a GPU")
    ema = recipe.ema
    teacher, cache = open_cache(recipe, models, splits, accelerator)
    average = Average(models.student.model, ema.decay, ema.warmup) if ema.enabled else None
    distiller = build_distiller(recipe, models)
    optimizer = build_optimizer(recipe, distiller)
    prepared, prepared_optimizer = accelerator.prepare(distiller, optimizer)
    around_backward = recomputing(recipe, models, accelerator)
    compile_backbones(recipe, models)
    settings = build_settings(recipe, splits.train)
    spec = eval_spec(recipe, models.student)
    reporter = Reporter(Path(recipe.out), accelerator, settings.last_step, Path(recipe.out).name)
    run = Run(
        accelerator=accelerator,
        settings=settings,
        control=control,
        watch=watch,
        seed=recipe.seed,
        distiller=prepared,
        classifier=build_classifier(models.student, None if average is None else average.module, spec),
        teacher=teacher,
        optimizer=prepared_optimizer,
        guard=build_guard(recipe, accelerator, distiller, prepared_optimizer, waiting),
        learning_rate=learning_rate_schedule(peak=recipe.optim.learning_rate, **dataclasses.asdict(recipe.schedule)),
        train_loader=build_train_loader(recipe, splits, models, accelerator, cache),
        eval_loader=build_eval_loader(recipe, splits.val, spec, accelerator),
        transform=around_transform(build_transform(recipe, splits.train.num_classes, spec, accelerator.device)),
        generator=torch.Generator(accelerator.device),
        reporter=reporter,
        checkpoints=Checkpoints(Path(recipe.out) / "checkpoints", recipe.train.keep_checkpoints),
        average=average,
        around_backward=around_backward,
        after_step=Observers(recipe, reporter, accelerator.process_index, settings.last_step),
        name_samples=lambda ids: [splits.train.key(i) for i in ids],
    )
    return run, models
