"""Recipe -> student, teacher and losses, on their device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from timm.models import is_model_pretrained
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.config import RecipeError
from distill.loss_options import loss_options, run_parameters, term_schedule
from distill.losses import LOSSES
from distill.models.anatomy import evaluating
from distill.models.backbone import Backbone
from distill.models.batchnorm import set_batchnorm
from distill.models.build import ProbedModel, create_student, create_teacher, probe
from distill.models.region_logits.layout import TimmModel
from distill.models.teacher import FrozenTeacher, bfloat16_usable
from distill.protocols import Criterion, DataFacts, InputSpec, Needs
from distill.recipe import Recipe
from distill.teacher_cache.teacher import WHOLE
from pipelines.setup.machine import memory_format


class Models(NamedTuple):
    """Student, teacher and the criteria between them, on the device."""

    student: Backbone
    teacher: FrozenTeacher | None
    criteria: dict[str, Criterion]
    remarks: tuple[str, ...] = ()
    """A remark, for people, of what was done so that the models' classes are those of the data."""


def build_models(recipe: Recipe, num_classes: int, data: DataFacts, device: torch.device) -> Models:
    """Student, teacher and criteria. Raises ValueError with one line where the pair cannot serve the losses. The order:

    1. both models are made and probed; 2. the criteria, from the facts of both, each checked against both models; 3. a backbone
    each, for what all criteria read; 4. the device and the memory format; 5. the teacher's precision. Models are looked at
    while they are float32 and eager.
    """
    check_precision(recipe.teacher.precision, device)
    check_graphs(recipe)
    student = build_student(recipe, num_classes, data.class_names)
    teacher = build_teacher(recipe, num_classes, data.class_names) if recipe.teacher.name != "none" else None
    remarks = tuple(model.remark for model in (student, teacher) if model is not None and model.remark)
    for name, entry in recipe.loss.items():
        student = student_of(name, term_schedule(entry)[1], student, teacher)
    student.backbone(Needs())  # raises for what is wrong with the student itself, before a loss is blamed for it
    criteria = build_criteria(recipe, student, teacher, data)
    check_batchnorm(recipe, student.model, criteria, data.micro_batch)
    student_needs, teacher_needs = needs_of(criteria)
    if recipe.teacher.cache and teacher is not None:
        teacher_needs |= Needs(region_logits=(WHOLE,))  # its way to them must be found while it is float32 and eager
    ours = set_batchnorm(student.backbone(student_needs), recipe.student.batchnorm)
    chosen = memory_format(recipe)
    trained: list[nn.Module] = [ours, *criteria.values()]
    for module in trained:
        module.to(device).to(memory_format=chosen)
    if teacher is None:
        return Models(ours, None, criteria, remarks)
    theirs = teacher.backbone(teacher_needs).to(device).to(memory_format=chosen)
    frozen = FrozenTeacher(theirs, chosen, recipe.teacher.precision, teacher_stream(recipe, device))
    return Models(ours, frozen, criteria, remarks)


def build_student(recipe: Recipe, num_classes: int, class_names: Sequence[str] = ()) -> ProbedModel:
    """The student with the weights that the recipe starts from."""
    name, start = recipe.student.name, recipe.student.initial_weights
    if start == "pretrained" and ":" not in name and not is_model_pretrained(name):
        raise RecipeError(f"student.initial_weights: timm publishes no weights for {name}; use random or a path")
    return create_student(
        name,
        num_classes=num_classes,
        weights=None if start in ("random", "pretrained") else start,
        image_size=recipe.data.image_size or None,
        drop_rate=recipe.student.drop_rate,
        drop_path_rate=recipe.student.drop_path_rate,
        class_tokens=recipe.student.class_tokens,
        class_names=class_names,
        fresh_head=recipe.student.fresh_head,
        # a fresh head over pretrained weights is what fine-tuning a student means
        model_kwargs={**recipe.student.model_kwargs, "pretrained": start == "pretrained" or None},
    )


def student_of(
    loss: str,
    options: Mapping[str, Any],
    student: ProbedModel,
    teacher: ProbedModel | None,
    build: Callable[[Callable[[], Any]], Any] = lambda make: make(),
) -> ProbedModel:
    """The student that this loss trains: the recipe's, or the one that the loss builds from it and the teacher.

    `build` calls what makes the model, as `outlined` does. RecipeError where the loss cannot build its student.
    """
    build_student = LOSSES[loss].build_student
    if build_student is None:
        return student
    if teacher is None or teacher.class_map is not None or teacher.facts.num_classes < 1:
        raise RecipeError(
            f"loss.{loss}: its student takes the teacher's classifier; name a teacher with one, of the data's classes"
        )
    images = {"student_images": student.anatomy.images, "teacher_images": teacher.anatomy.images}
    defaults = {key: default for key, (_, default) in loss_options(LOSSES[loss]).items()}
    try:
        model = build(partial(build_student, student.model, teacher.model, **images, **{**defaults, **options}))
    except ValueError as error:
        raise RecipeError(f"loss.{loss}: {error}") from None
    name = f"{student.anatomy.name} as {type(model).__name__}"
    return probe(model, name=name, input_spec=student.input_spec, class_tokens=student.class_tokens)


def build_teacher(recipe: Recipe, num_classes: int, class_names: Sequence[str] = ()) -> ProbedModel:
    """The teacher with the recipe's weights."""
    return create_teacher(
        recipe.teacher.name,
        weights=recipe.teacher.weights,
        num_classes=num_classes,
        model_kwargs=recipe.teacher.model_kwargs,
        class_tokens=recipe.teacher.class_tokens,
        class_map=recipe.teacher.class_map,
        class_names=class_names,
    )


def build_criteria(recipe: Recipe, student: ProbedModel, teacher: ProbedModel | None, data: DataFacts) -> dict[str, Criterion]:
    """The recipe's losses. RecipeError, with a line for each loss that the pair cannot serve, or that cannot be computed with
    the mixed images that the recipe asks for."""
    mixed = [name for name in ("mixup", "cutmix") if getattr(recipe.augment, name)]
    criteria, problems = {}, []
    for name, entry in recipe.loss.items():
        try:
            criteria[name] = build_criterion(name, term_schedule(entry)[1], student, teacher, data)
        except RecipeError as error:
            problems.append(str(error))
            continue
        if mixed and not criteria[name].accepts_soft_labels:
            problems.append(
                f"loss.{name}: needs one class per image, and images mixed by augment.{mixed[0]} have two; drop either"
            )
    if problems:
        raise RecipeError("\n".join(problems))
    return criteria


def build_criterion(
    name: str, options: Mapping[str, Any], student: ProbedModel, teacher: ProbedModel | None, data: DataFacts
) -> Criterion:
    """One loss, of the facts that its constructor names before `*` and of its recipe keys.

    RecipeError, with the reason, where it cannot be made of these models or one of them cannot give what it reads.
    """
    facts = {"student": student.facts, "teacher": None if teacher is None else teacher.facts, "data": data}
    try:
        criterion = LOSSES[name](**{key: facts[key] for key in run_parameters(LOSSES[name])}, **options)
        student.backbone(criterion.student_needs)
        read = criterion.teacher_needs
        if student.facts.num_classes == 1 and read is not None and (read.logits or read.region_logits):
            raise ValueError("compares the classes of an image, and the data have one; drop it, or take data of several")
        if teacher is not None:
            teacher.backbone(criterion.teacher_needs or Needs())
    except ValueError as error:
        raise RecipeError(f"loss.{name}: {error}") from None
    return criterion


def served_losses(
    student: ProbedModel,
    teacher: ProbedModel,
    data: DataFacts,
    options: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    build: Callable[[Callable[[], Any]], Any] = lambda make: make(),
) -> dict[str, Criterion | str]:
    """Every loss of the table as a run makes it, with its default options where `options` names no others; or the reason why a
    run refuses it. `build` as in `student_of`."""
    found: dict[str, Criterion | str] = {}
    for name in LOSSES:
        try:
            chosen = options.get(name, {})
            mine = student_of(name, chosen, student, teacher, build)
            found[name] = build_criterion(name, chosen, mine, teacher, data)
        except RecipeError as error:
            found[name] = str(error).removeprefix(f"loss.{name}: ")
    return found


def needs_of(criteria: Mapping[str, Criterion]) -> tuple[Needs, Needs]:
    """What all criteria together read of the student, and of the teacher."""
    student, teacher = Needs(), Needs()
    for criterion in criteria.values():
        student |= criterion.student_needs
        teacher |= criterion.teacher_needs or Needs()
    return student, teacher


def build_classifier(student: Backbone, averaged: TimmModel | None, spec: InputSpec) -> Backbone:
    """What evaluation runs: the student, or the average of its weights, on images of `spec`. RecipeError where the student does
    not take images of that size."""
    classifier = student.serving(Needs(), averaged, spec)
    if (spec.height, spec.width) != (student.input_spec.height, student.input_spec.width):
        image = torch.zeros(1, 3, spec.height, spec.width, device=next(student.parameters()).device)
        try:
            with evaluating(classifier):
                classifier(image)
        except (RuntimeError, AssertionError, ValueError) as error:  # whatever a layer makes of a size that is not its own
            raise RecipeError(f"data.eval_image_size: {spec.height}: {student.name} does not take it: {error}") from None
    return classifier


def compile_backbones(recipe: Recipe, models: Models) -> None:
    """Compiles the forward (and backward) of the models that `train.compile` names, at their first call.

    In place: the modules, their parameters' names and their copies stay what they were, and evaluation, which sees batches
    of several sizes through another backbone over the same weights, stays eager.
    """
    wanted = {"student": models.student, "teacher": None if models.teacher is None else models.teacher.backbone}
    for name, backbone in wanted.items():
        if backbone is not None and recipe.train.compile in (name, "both"):
            # every training batch has one shape; a general one would be slower
            backbone.compile(mode=recipe.train.compile_mode, dynamic=False)


def check_batchnorm(recipe: Recipe, student: nn.Module, criteria: Mapping[str, nn.Module], micro_batch: int) -> None:
    """Raises RecipeError where BatchNorm would normalise one image by itself: it has no statistics of a batch then, and behind
    a pooling layer PyTorch refuses it in the first step."""
    train, mode = recipe.train, recipe.student.batchnorm
    if micro_batch > 1:
        return
    processes = train.global_batch_size // train.accumulate
    norms = {f"loss.{name}": module for name, module in criteria.items()}
    if mode == "local" or (mode == "sync" and processes == 1):
        norms = {f"student {recipe.student.name}": student, **norms}
    for name, module in norms.items():
        if any(isinstance(each, _BatchNorm) and each.training for each in module.modules()):
            raise RecipeError(
                f"{name}: its BatchNorm would see 1 image at a time: train.global_batch_size {train.global_batch_size} over"
                f" processes: {processes}, each with train.accumulate {train.accumulate}; raise the batch, lower accumulate, or"
                " say student.batchnorm frozen"
            )


def check_precision(precision: str, device: torch.device) -> None:
    """Raises RecipeError where the device does not compute in the precision that the recipe asks for."""
    if precision == "bf16" and not bfloat16_usable(device):
        raise RecipeError(
            f"teacher.precision: 'bf16' needs a device that computes in bfloat16, {device} does not; leave it at auto"
        )


def check_graphs(recipe: Recipe) -> None:
    """Raises RecipeError where CUDA graphs would be replayed for several micro-batches of one step.

    What the first keeps for its backward pass lies in memory that the second may overwrite: only a step's end is marked.
    """
    train = recipe.train
    if train.compile != "none" and train.compile_mode != "default" and train.accumulate > 1:
        raise RecipeError(
            f"train.compile_mode: {train.compile_mode} makes CUDA graphs, which are not tried with train.accumulate"
            f" {train.accumulate}; say compile_mode default, or accumulate 1"
        )


def teacher_stream(recipe: Recipe, device: torch.device) -> torch.cuda.Stream | None:
    """The stream of the teacher's forward pass where it runs beside the student's; None: everything is in one.

    RecipeError where both models would be replayed from CUDA graphs, which share memory on the promise that they take turns.
    """
    train = recipe.train
    if not train.overlap_teacher:
        return None
    if train.compile == "both" and train.compile_mode != "default":
        raise RecipeError(
            f"train.overlap_teacher: {train.compile_mode} makes CUDA graphs of both models, which may not run at once;"
            " say compile_mode default, or compile one model"
        )
    return torch.cuda.Stream(device) if device.type == "cuda" else None
