"""What is wrong, or doubtful, about valid values of a recipe beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distill.data.order import check_lanes, micro_batch_size
from distill.loss_options import term_schedule
from distill.recipe import LANE_WINDOW, LANES, Data, Recipe, Train

INITIAL_SHARE = 0.01
"""Share of its initial weights from which an average is said not to have warmed up."""
OWNED = {
    "num_classes": "it is that of the data; leave it out",
    "in_chans": "images are RGB, grey ones too; leave it out",
    "features_only": "stages are found without it; leave it out",
    "out_indices": "stages are found without it; leave it out",
    "global_pool": "the head is read as the architecture has it; leave it out",
    "drop_rate": "use student.drop_rate",
    "drop_path_rate": "use student.drop_path_rate",
    **dict.fromkeys(("pretrained", "checkpoint_path", "state_dict"), "use student.initial_weights or teacher.weights"),
    **dict.fromkeys(("pretrained_cfg", "pretrained_cfg_overlay"), "use data.image_size, crop_fraction and interpolation"),
}
"""Arguments of timm.create_model that the recipe decides -> what to do instead."""


def owned_arguments(recipe: Recipe) -> Iterator[str]:
    """A line for each argument among `model_kwargs` that is not the user's to give."""
    for section, kwargs in (("student", recipe.student.model_kwargs), ("teacher", recipe.teacher.model_kwargs)):
        for key in OWNED.keys() & kwargs.keys():
            if (section, key, kwargs[key]) == ("teacher", "num_classes", 0):  # takes its classifier off
                continue
            if section == "teacher" and key.startswith("drop"):  # a teacher that is trained has no field for it
                continue
            more = ", or say 0 for a teacher without its classifier" if (section, key) == ("teacher", "num_classes") else ""
            yield f"{section}.model_kwargs: {key}: {OWNED[key]}{more}"


def reads_teacher(loss: type) -> bool:
    """Whether a loss needs a teacher; one that only an instance can tell does."""
    return getattr(loss, "teacher_needs", True) is not None


def combinations(recipe: Recipe, losses: Mapping[str, type]) -> Iterator[str]:
    """Each impossible combination of valid values, as one line."""
    alone = recipe.teacher.name == "none"
    for name in recipe.loss:
        if alone and reads_teacher(losses[name]):
            yield f"loss.{name}: needs a teacher, but teacher.name is 'none'; name one with --teacher, or drop this loss"
    builders = [name for name in recipe.loss if getattr(losses[name], "build_student", None) is not None]
    for name in builders[1:]:
        yield f"loss.{name}: trains a student of its own, and so does loss.{builders[0]}; drop either"
    if not recipe.loss:
        yield "loss: no loss is left; give at least one"
    if recipe.loss and not alone and not builders and not any(reads_teacher(losses[name]) for name in recipe.loss):
        names = ", ".join(recipe.loss)
        yield (
            f"teacher.name: {recipe.teacher.name}, but no loss reads a teacher ({names}); add one with --loss.NAME.weight 1,"
            " or say --teacher none"
        )
    yield from owned_arguments(recipe)
    if recipe.optim.name == "dot":
        yield from separation(recipe, losses)
    if recipe.schedule.name == "step" and not recipe.schedule.decay_epochs:
        yield "schedule.decay_epochs: empty, but schedule.name is 'step'; give the epochs, such as [30, 60, 90]"
    if recipe.schedule.name != "step" and recipe.schedule.decay_epochs:
        yield f"schedule.decay_epochs: set, but schedule.name is {recipe.schedule.name!r}; it belongs to 'step'"
    try:
        recipe.augment.of_each_image()
    except ValueError as error:
        yield from (f"augment.{line}" for line in str(error).splitlines())
    try:
        micro_batch_size(recipe.train.global_batch_size, recipe.train.accumulate, world_size=1)
    except ValueError as error:
        yield f"train.accumulate: {error}"
    else:
        yield from shuffles(recipe.data, recipe.train)
    if recipe.augment.repeats > 1 and recipe.data.shuffle == "lanes":
        yield f"augment.repeats: {recipe.augment.repeats}, but lanes show every image once; say 1, or --data.shuffle global"
    yield from plain_views(recipe, losses)


def plain_views(recipe: Recipe, losses: Mapping[str, type]) -> Iterator[str]:
    """A line for each thing that does not go with plain views of an image beside altered ones, or cannot go without them."""
    augment = recipe.augment
    if augment.plain_repeats and augment.plain_repeats >= augment.repeats:
        yield (
            f"augment.plain_repeats: {augment.plain_repeats} of augment.repeats {augment.repeats} views; it must be less, for"
            f" others are to be altered; say --augment.repeats {augment.plain_repeats + 1}, or 0"
        )
    if augment.plain_repeats and (augment.mixup or augment.cutmix):
        yield (
            f"augment.plain_repeats: {augment.plain_repeats}, but mixup and cutmix would mix plain views with altered ones; say"
            " 0 for either"
        )
    for name in recipe.loss:
        if getattr(losses[name], "reads_plain", False) and not augment.plain_repeats:
            yield (
                f"loss.{name}: tells plain views of an image from altered ones, and augment.plain_repeats is 0; say"
                " --augment.repeats 2 --augment.plain_repeats 1"
            )


def separation(recipe: Recipe, losses: Mapping[str, type]) -> Iterator[str]:
    """A line for each setting that does not go with DOT, which takes the distillation's gradient apart from the task's."""
    if {reads_teacher(losses[name]) for name in recipe.loss} != {True, False}:
        yield (
            "optim.name: dot has a momentum for the losses that read the teacher and one for the others, and here is only one"
            f" kind ({', '.join(recipe.loss) or 'none'}); give both, or say optim.name sgd"
        )
    for name in recipe.loss:
        if getattr(losses[name], "rests", False):
            yield f"loss.{name}: what it trains changes with the epochs, which optim.name 'dot' does not follow; say sgd"
    if recipe.train.clip_gradient_norm:
        yield (
            f"train.clip_gradient_norm: {recipe.train.clip_gradient_norm:g}, but optim.name is 'dot', which holds a second"
            " gradient that is not clipped; say 0, or optim.name sgd"
        )
    if recipe.train.compile in ("student", "both"):
        # a compiled student gives every weight a gradient, zeros too: no telling which of them a loss does not reach
        yield (
            f"train.compile: {recipe.train.compile}, but optim.name 'dot' asks which weights each loss reaches, and a compiled"
            " student does not tell; say teacher or none"
        )


def shuffles(data: Data, train: Train) -> Iterator[str]:
    """A line for each option of the visiting order that does not fit the order, or has no effect on it."""
    if data.shuffle == "blocks" and not data.shuffle_block:
        yield "data.shuffle_block: 0, but data.shuffle is 'blocks'; give the number of samples of a block, such as 64"
    if data.shuffle != "blocks" and data.shuffle_block:
        yield f"data.shuffle_block: {data.shuffle_block}, but data.shuffle is {data.shuffle!r}; it belongs to 'blocks', say 0"
    if data.shuffle != "lanes" and (data.lanes, data.lane_window) != (LANES, LANE_WINDOW):
        yield f"data.lanes and data.lane_window: set, but data.shuffle is {data.shuffle!r}; they belong to 'lanes'"
    if data.shuffle == "lanes":
        try:
            check_lanes(data.lanes, train.global_batch_size, accumulate=train.accumulate)
        except ValueError as error:
            yield f"data.lanes: {error}"


def doubts(recipe: Recipe, losses: Mapping[str, type], steps_per_epoch: int) -> Iterator[str]:
    """A line for each setting that has no effect, or not the usual one, in a run of this length; it may be meant."""
    epochs = float(recipe.train.epochs)
    if recipe.train.max_steps:
        epochs = min(epochs, recipe.train.max_steps / steps_per_epoch)
    schedule, augment = recipe.schedule, recipe.augment
    ends = f"the run ends after {epochs:g} epochs"
    if schedule.warmup_epochs >= epochs:
        yield f"schedule.warmup_epochs: {schedule.warmup_epochs:g}, and {ends}: the learning rate never reaches its peak"
    if late := [epoch for epoch in schedule.decay_epochs if epoch >= epochs]:
        yield f"schedule.decay_epochs: {', '.join(f'{epoch:g}' for epoch in late)} never come, {ends}"
    if augment.mix_off_epoch >= epochs:
        yield f"augment.mix_off_epoch: {augment.mix_off_epoch} never comes, {ends}"
    altered = augment.rand_augment or augment.three_augment or augment.color_jitter or augment.erasing
    if augment.plain_repeats and not altered:
        yield f"augment.plain_repeats: {augment.plain_repeats}, but nothing alters the other views; say augment.rand_augment"
    if augment.repeats > recipe.train.global_batch_size:
        yield (
            f"augment.repeats: {augment.repeats}, and a batch has {recipe.train.global_batch_size} views: it is of one image"
            " alone; say a smaller number"
        )
    for name, entry in recipe.loss.items():
        term, own = term_schedule(entry)
        if term.start_epoch and not reads_teacher(losses[name]) and recipe.train.compile in ("student", "both"):
            # a compiled student gives every weight a gradient, zeros too
            yield (
                f"train.compile: {recipe.train.compile}, and loss.{name} starts at epoch {term.start_epoch:g}: what no term"
                " reaches until then (often the classifier) decays all the same, for a compiled student does not tell which"
                " that is; say teacher or none"
            )
        for key, value in own.items():
            if key.endswith("_epochs") and value >= epochs:
                yield f"loss.{name}.{key}: {value:g}, and {ends}: what follows these epochs never comes"
        if term.start_epoch >= epochs:
            yield f"loss.{name}.start_epoch: {term.start_epoch:g}, and {ends}: the term never counts"
        elif term.start_epoch + term.warmup_epochs > epochs:
            yield f"loss.{name}.warmup_epochs: {term.warmup_epochs:g}, and {ends}: the term never has its whole weight"
        elif term.stop_epoch is not None and term.start_epoch + term.warmup_epochs > term.stop_epoch > term.start_epoch:
            yield f"loss.{name}.warmup_epochs: {term.warmup_epochs:g}, and the term stops before it has its whole weight"
        if term.stop_epoch is not None and term.stop_epoch <= term.start_epoch:
            yield f"loss.{name}.stop_epoch: {term.stop_epoch:g}, and it starts at {term.start_epoch:g}: the term never counts"
        if term.final_weight is not None and term.decay_start_epoch >= epochs:
            yield f"loss.{name}.decay_start_epoch: {term.decay_start_epoch:g}, and {ends}: final_weight has no effect"
    ema, steps = recipe.ema, round(epochs * steps_per_epoch)
    left = 0.0 if ema.warmup else ema.decay**steps
    if ema.enabled and left > INITIAL_SHARE:
        yield (
            f"ema.decay: {ema.decay:g} over {steps} steps leaves {left:.0%} of the initial weights in the average, which is"
            " evaluated and exported; say ema.warmup true, or a smaller decay"
        )
