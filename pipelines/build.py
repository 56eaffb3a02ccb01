"""Recipe -> objects: the only file that knows every room."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from timm.models import is_model_pretrained
from timm.utils import ModelEmaV3
from torch import nn

from distill.checkpoint import Checkpoints
from distill.config import RecipeError, term_schedule
from distill.data import dali, reference
from distill.data.augment import TrainTransform
from distill.data.dali_graph import dali_available
from distill.data.index import ShardIndex
from distill.data.order import derive_seed
from distill.distiller import Distiller
from distill.engine import Plan, Run
from distill.guard import Guard
from distill.losses import LOSSES
from distill.losses.regions import region_matrix
from distill.mixing import BatchTransform, seed_all
from distill.models.backbone import Backbone
from distill.models.batchnorm import set_batchnorm
from distill.models.build import create_student, create_teacher
from distill.models.memory import set_activation_checkpointing, unchanged_statistics
from distill.models.served import ServedTeacher
from distill.models.weights import load_weights
from distill.optim import create_optimizer, learning_rate_schedule, weight_schedule
from distill.protocols import InputSpec, Loader, Needs
from distill.recipe import Recipe
from distill.report import Reporter
from pipelines.formats import Chooser, Formats, as_asked, choose_formats, memory_format
from pipelines.machine import micro_batch_size, num_threads
from pipelines.speedups import Observers, check_precision, compile_backbones, mark_step, teacher_stream


@contextmanager
def requests() -> Iterator[None]:
    """What cannot be built as asked is the request's fault: every ValueError inside becomes a RecipeError."""
    try:
        yield
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from error


class Splits(NamedTuple):
    """The shard indexes of one data set."""

    train: ShardIndex
    val: ShardIndex


class Models(NamedTuple):
    """Both backbones and the criteria between them, on the device."""

    student: Backbone
    teacher: Backbone | None
    criteria: dict[str, nn.Module]
    formats: Formats
    served: ServedTeacher | None
    """The teacher as the steps call it."""


def build_splits(recipe: Recipe, accelerator: Accelerator) -> Splits:
    """Both indexes, checked against their shards and each other; prepares the embedded data set where the recipe asks."""
    root = Path(recipe.data.train).parent
    # only into the place that the recipe means: a mistyped --train must not fill somebody's folder
    if recipe.data.prepare == "digits" and [root / "train", root / "val"] == [Path(recipe.data.train), Path(recipe.data.val)]:
        from shards.prepare import prepare_digits

        with accelerator.main_process_first():
            prepare_digits(root)
    train, val = ShardIndex.open(Path(recipe.data.train)), ShardIndex.open(Path(recipe.data.val))
    if train.class_names != val.class_names:
        raise RecipeError(
            f"data: {recipe.data.train} has {train.num_classes} classes and {recipe.data.val} has {val.num_classes},"
            " or their names differ; prepare both splits in one run"
        )
    if train.num_samples < recipe.train.global_batch_size:
        raise RecipeError(
            f"train.global_batch_size: {recipe.train.global_batch_size} is more than the {train.num_samples} training images"
        )
    return Splits(train, val)


def check_mixing(recipe: Recipe, micro_batch: int) -> None:
    """Raises RecipeError where Mixup or CutMix cannot go with the losses or the batch."""
    if not (recipe.augment.mixup or recipe.augment.cutmix):
        return
    if micro_batch % 2:
        raise RecipeError(f"augment.mixup: images are mixed in pairs, and a micro-batch of {micro_batch} is odd")
    for name, entry in recipe.loss.items():
        if name == "dkd" or entry.get("base") == "dkd":
            raise RecipeError(
                f"loss.{name}: dkd splits off one target class, and mixed images have two; use kd, or no mixup/cutmix"
            )


def build_criteria(recipe: Recipe, student: Backbone, teacher: Backbone | None) -> dict[str, nn.Module]:
    """The recipe's losses; parameters named in CONTEXT_PARAMETERS come from the models."""
    context = {
        "student_channels": student.stage_channels,
        "teacher_channels": teacher.stage_channels if teacher is not None else (),
    }
    criteria = {}
    for name, entry in recipe.loss.items():
        options = term_schedule(entry)[1]
        wanted = {k: v for k, v in context.items() if k in inspect.signature(LOSSES[name]).parameters}
        try:
            criteria[name] = LOSSES[name](**wanted, **options)
        except ValueError as error:
            raise RecipeError(f"loss.{name}: {error}") from None
    return criteria


def needs_of(criteria: Mapping[str, nn.Module]) -> tuple[Needs, Needs]:
    """What all criteria together read of the student, and of the teacher."""
    student, teacher = Needs(), Needs()
    for criterion in criteria.values():
        student |= criterion.student_needs  # type: ignore[operator]
        teacher |= criterion.teacher_needs or Needs()  # type: ignore[operator]
    return student, teacher


def build_models(recipe: Recipe, num_classes: int, device: torch.device, choose: Chooser = as_asked) -> Models:
    """Student, teacher and criteria; `choose` says which memory format each model gets. Raises ValueError with one line where
    the pair cannot serve the losses."""
    name = recipe.student.name
    if recipe.student.initial_weights == "pretrained" and ":" not in name and not is_model_pretrained(name):
        raise RecipeError(f"student.initial_weights: timm publishes no weights for {name}; use random or a path")
    plain = create_student(
        recipe.student.name,
        num_classes=num_classes,
        needs=Needs(),
        pooling=region_matrix,
        image_size=recipe.data.image_size or None,
        drop_rate=recipe.student.drop_rate,
        drop_path_rate=recipe.student.drop_path_rate,
        class_tokens=recipe.student.class_tokens,
        # a fresh head over pretrained weights is what fine-tuning a student means
        model_kwargs={**recipe.student.model_kwargs, "pretrained": recipe.student.initial_weights == "pretrained" or None},
    )
    if recipe.student.initial_weights not in ("random", "pretrained"):
        load_weights(plain.model, Path(recipe.student.initial_weights))
    teacher = build_teacher(recipe, num_classes) if recipe.teacher.name != "none" else None
    criteria = build_criteria(recipe, plain, teacher)
    student_needs, teacher_needs = needs_of(criteria)
    # the criteria had to know the channels first; now each backbone is probed for what they read
    student = plain.serving(student_needs)
    if teacher is not None:
        teacher = teacher.serving(teacher_needs)
    student = set_batchnorm(student, recipe.student.batchnorm)
    for module in (student, teacher, *criteria.values()):
        if module is not None:
            module.to(device)
    formats = choose(recipe, student, teacher)
    for module in (student, *criteria.values()):
        module.to(memory_format=memory_format(formats.student))
    if teacher is None:
        return Models(student, None, criteria, formats, None)
    teacher.to(memory_format=memory_format(formats.teacher))
    served = ServedTeacher(teacher, memory_format(formats.teacher), teacher_stream(recipe, device))
    return Models(student, teacher, criteria, formats, served)


def build_teacher(recipe: Recipe, num_classes: int) -> Backbone:
    """The frozen teacher with the recipe's weights."""
    return create_teacher(
        recipe.teacher.name,
        weights=recipe.teacher.weights,
        num_classes=num_classes,
        needs=Needs(),
        pooling=region_matrix,
        model_kwargs=recipe.teacher.model_kwargs,
        class_tokens=recipe.teacher.class_tokens,
        class_map=recipe.teacher.class_map,
    )


def eval_spec(recipe: Recipe, model: Backbone) -> InputSpec:
    """How the student is evaluated: its own way, unless the recipe says otherwise."""
    spec = model.input_spec
    if recipe.data.crop_fraction:
        spec = dataclasses.replace(spec, crop_fraction=recipe.data.crop_fraction)
    if recipe.data.interpolation != "auto":
        spec = dataclasses.replace(spec, interpolation=recipe.data.interpolation)
    return spec


def _loader_room(recipe: Recipe) -> tuple[Any, Any]:
    asked = recipe.data.loader
    if asked == "dali" and not dali_available():
        raise RecipeError(
            "data.loader: 'dali', but nvidia.dali cannot be imported; install nvidia-dali-cuda120 or use 'reference'"
        )
    if asked != "reference" and dali_available():
        return dali.DaliTrainLoader, dali.DaliEvalLoader
    return reference.ReferenceTrainLoader, reference.ReferenceEvalLoader


def fault_report(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """Where this process reports bad samples, a JSON line each; nowhere outside a run's folder."""
    out = Path(recipe.out or "nowhere")
    return out / f"faults-rank{accelerator.process_index}.jsonl" if out.is_dir() else None


def build_train_loader(recipe: Recipe, splits: Splits, models: Models, accelerator: Accelerator) -> Loader:
    """Training views at the larger of both models' input sizes; the other model resizes on the device."""
    specs = [m.input_spec for m in (models.student, models.teacher) if m is not None]
    augment, asked = recipe.augment, recipe.data.interpolation
    transform = TrainTransform(
        crop=augment.crop,
        scale=augment.scale,
        ratio=augment.ratio,
        padding=augment.padding,
        flip=augment.flip,
        interpolation=specs[0].interpolation if asked == "auto" else asked,
        rand_augment=augment.rand_augment,
        color_jitter=augment.color_jitter,
    )
    return _loader_room(recipe)[0](
        splits.train,
        size=(max(s.height for s in specs), max(s.width for s in specs)),
        transform=transform,
        global_batch_size=recipe.train.global_batch_size,
        accumulate=recipe.train.accumulate,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=recipe.seed,
        shuffle_block=recipe.data.shuffle_block,
        device=accelerator.device,
        num_threads=num_threads(recipe),
        max_bad_rate=recipe.data.max_bad_rate,
        fault_report=fault_report(recipe, accelerator),
    )


def build_eval_loader(recipe: Recipe, index: ShardIndex, spec: InputSpec, accelerator: Accelerator) -> Loader:
    """Every image of a split once, as `spec` says."""
    return _loader_room(recipe)[1](
        index,
        spec=spec,
        batch_size=recipe.train.evaluate_batch_size or micro_batch_size(recipe, accelerator.num_processes),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        num_threads=num_threads(recipe),
        max_bad_rate=recipe.data.max_bad_rate,
        fault_report=fault_report(recipe, accelerator),
    )


def build_transform(
    recipe: Recipe, num_classes: int, spec: InputSpec, device: torch.device, channels_last: bool
) -> BatchTransform:
    """What happens to a batch on the device before the models see it."""
    augment = recipe.augment
    return BatchTransform(
        num_classes=num_classes,
        mean=spec.mean,
        std=spec.std,
        device=device,
        channels_last=channels_last,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mix_probability=augment.mix_probability,
        cutmix_share=augment.cutmix_share,
        erasing=augment.erasing,
        erasing_mode=augment.erasing_mode,
    )


def build_plan(recipe: Recipe, num_samples: int) -> Plan:
    """The numbers of the loop."""
    train = recipe.train
    return Plan(
        epochs=train.epochs,
        steps_per_epoch=num_samples // train.global_batch_size,
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


def rehearse(recipe: Recipe, num_classes: int, device: torch.device) -> None:
    """Builds everything that the main run needs but the teacher's weights, and throws it away: what is wrong with a request is
    said before days are spent on training its teacher."""
    rehearsed = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, weights="random"))
    models = build_models(rehearsed, num_classes, torch.device("cpu"))
    check_precision(recipe.teacher, models.teacher, device)
    build_optimizer(rehearsed, build_distiller(rehearsed, models))


def build_optimizer(recipe: Recipe, distiller: Distiller) -> torch.optim.Optimizer:
    """timm's optimiser over the student and the criteria's projectors."""
    optim = recipe.optim
    return create_optimizer(
        distiller,
        optim.name,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        momentum=optim.momentum,
        decay_bias_and_norm=optim.decay_bias_and_norm,
        options=optim.options,
    )


def build_distiller(recipe: Recipe, models: Models) -> Distiller:
    """The module that DDP will wrap."""
    schedules = {name: weight_schedule(**dataclasses.asdict(term_schedule(entry)[0])) for name, entry in recipe.loss.items()}
    join = () if models.served is None else (models.served.join,)
    return Distiller(models.student, models.criteria, schedules, *join)


def build(recipe: Recipe, accelerator: Accelerator, splits: Splits) -> tuple[Run, Models]:
    """The run that a recipe describes, at step 0. The order of initialisation matters:

    1. seed; 2. models and criteria, on the device, with their BatchNorm policy; 3. the average, a copy of the plain
    student before anything wraps it; 4. the optimiser over what is trained; 5. Accelerate wraps both; 6. compilers, which work
    at the first call. Restoring comes after.
    """
    seed_all(derive_seed(recipe.seed, "initialisation"))
    batch = micro_batch_size(recipe, accelerator.num_processes)
    choose = partial(choose_formats, accelerator=accelerator, batch=batch)
    models = build_models(recipe, splits.train.num_classes, accelerator.device, choose)
    check_precision(recipe.teacher, models.teacher, accelerator.device)
    if recipe.train.overlap_teacher and accelerator.device.type != "cuda":
        accelerator.print("train.overlap_teacher: no effect here, it needs a GPU")
    ema = recipe.ema
    average = ModelEmaV3(models.student.model, decay=ema.decay, use_warmup=ema.warmup) if ema.enabled else None
    distiller = build_distiller(recipe, models)
    optimizer = build_optimizer(recipe, distiller)
    prepared, prepared_optimizer = accelerator.prepare(distiller, optimizer)
    checkpointing = recipe.student.checkpoint_activations
    if checkpointing:
        before, after = set_activation_checkpointing(models.student)
        accelerator.print(f"activations of one image: {after / 1e6:.1f} MB instead of {before / 1e6:.1f} MB (float32)")
    compile_backbones(recipe, models.student, models.teacher)
    plan = build_plan(recipe, splits.train.num_samples)
    spec = eval_spec(recipe, models.student)
    rank = accelerator.process_index
    reporter = Reporter(Path(recipe.out), accelerator, plan.last_step, Path(recipe.out).name)

    def begin_step(step: int) -> None:
        mark_step()
        seed_all(derive_seed(recipe.seed, "step", step, rank))

    run = Run(
        accelerator=accelerator,
        plan=plan,
        distiller=prepared,
        classifier=models.student.serving(Needs(), None if average is None else average.module).to(accelerator.device),
        teacher=models.served,
        optimizer=prepared_optimizer,
        guard=Guard(prepared_optimizer, accelerator.scaler, partial(accelerator.reduce, reduction="sum")),
        learning_rate=learning_rate_schedule(peak=recipe.optim.learning_rate, **dataclasses.asdict(recipe.schedule)),
        train_loader=build_train_loader(recipe, splits, models, accelerator),
        eval_loader=build_eval_loader(recipe, splits.val, spec, accelerator),
        transform=build_transform(recipe, splits.train.num_classes, spec, accelerator.device, models.formats.student),
        seed_step=begin_step,
        reporter=reporter,
        checkpoints=Checkpoints(Path(recipe.out) / "checkpoints", recipe.train.keep_checkpoints),
        average=average,
        around_backward=partial(unchanged_statistics, models.student.model) if checkpointing else nullcontext,
        after_step=Observers(recipe, reporter, rank, plan.last_step),
        name_samples=lambda ids: [splits.train.key(i) for i in ids],
    )
    return run, models
