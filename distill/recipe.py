"""The recipe: one frozen dataclass tree. Everything that changes a result is a field here, with its meaning and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, with_config

from distill.batch_transform import ErasingMode
from distill.data.augment.parameters import Crop, TrainTransform
from distill.data.decoding import DecodeName
from distill.data.loaders import LoaderName
from distill.protocols import BatchNormMode, ClassTokens, Interpolation

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

LANES, LANE_WINDOW = 32, 4
"""With 1,024 shards of ImageNet: 150 shards in a batch of 2,048, a node of 4 fetches a quarter and holds 8 GB at once."""

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]


def _doc(text: str, default: Any, may_change: bool = False) -> Any:
    """A dataclass field with its one-line description, which `--help` shows."""
    metadata = {"doc": text, "may_change": may_change}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_changeable = partial(_doc, may_change=True)
"""A field that a resumed run may say differently, because it does not change what is computed. Paths are among these, for data
and weights may move; the run's manifest makes sure that their contents did not change."""


@with_config(_STRICT)
@dataclass(frozen=True)
class Data:
    train: str = _changeable("folder or URL of training shards (made by shards/prepare.py)", "data/digits/train")
    val: str = _changeable("folder or URL of validation shards", "data/digits/val")
    cache_dir: str = _changeable("remote shards: folder of a local disk for them; empty: ~/.cache/distill", "")
    cache_limit: NonNegative = _changeable("remote shards: GB of that folder for this run; 0: what the disk has free", 0.0)
    prepare: Literal["none", "digits"] = _doc("an embedded data set to prepare beside `train` if it is not there", "none")
    loader: Literal["auto", LoaderName] = _changeable("auto: DALI where it is installed, else torch + PIL", "auto")
    decode: DecodeName = _changeable(
        "on a GPU: DALI decodes the whole image, or the window that is wanted, there; or the host does; auto: the first that"
        " works there",
        "auto",
    )
    shuffle: Literal["global", "blocks", "lanes"] = _doc(
        "the order of an epoch: a shuffle of the whole split; blocks: for slow disks; lanes: every node reads its own part of"
        " the shards, for shards that are no local files",
        "global",
    )
    shuffle_block: Count = _doc("blocks: so many neighbours in random order, mixed within 8 such blocks", 0)
    lanes: Positive = _doc("lanes: runs of shards that are read side by side; a multiple of nodes x accumulate", LANES)
    lane_window: Positive = _doc("lanes: shards of a lane among which samples are shuffled", LANE_WINDOW)
    num_threads: Count = _changeable("decoding threads per process; 0: the cores of this machine / its processes", 0)
    image_size: Count = _doc("side of the student's square input in pixels; 0: the student's own", 0)
    eval_image_size: Count = _doc("evaluation: side of the square input in pixels; 0: as in training", 0)
    max_bad_rate: Fraction = _changeable(
        "share of the samples that may turn out bad (replaced, reported) before the run stops", 1e-4
    )
    crop_fraction: Fraction = _doc("evaluation: kept share of the resized shorter side; 0: the model's own", 0.0)
    interpolation: Literal["auto", Interpolation] = _doc("of training and evaluation; auto: the student's own", "auto")


@with_config(_STRICT)
@dataclass(frozen=True)
class Augment:
    # what is done to one image has its defaults in `TrainTransform`
    crop: Crop = _doc("how a training view is cut", TrainTransform.crop)
    scale: tuple[float, float] = _doc("random_resized: range of the view's share of the image's area", TrainTransform.scale)
    ratio: tuple[float, float] = _doc("random_resized: range of the view's width / height", TrainTransform.ratio)
    padding: Count = _doc(
        "pixels added on each side before a crop of the input size; pad: black ones; simple_random: mirrored ones, after the"
        " shorter side is resized to it",
        TrainTransform.padding,
    )
    flip: Fraction = _doc("probability of a horizontal flip", TrainTransform.flip)
    rand_augment: str | None = _doc("timm's notation, such as rand-m9-mstd0.5-inc1; null is off", TrainTransform.rand_augment)
    three_augment: bool = _doc(
        "each image is made grey, solarised or blurred, one of the three, before colour jitter: 3-Augment (timm's 3a)",
        TrainTransform.three_augment,
    )
    color_jitter: NonNegative = _doc("brightness, contrast and saturation by up to this share", TrainTransform.color_jitter)
    repeats: Positive = _doc(
        "views of each image in a global batch (repeated augmentation); an epoch has as many views, of 1/N of the images", 1
    )
    plain_repeats: Count = _doc("with repeats: so many views of each image are cut and flipped, and not altered otherwise", 0)
    mixup: NonNegative = _doc("alpha of Mixup, 0 is off", 0.0)
    cutmix: NonNegative = _doc("alpha of CutMix, 0 is off", 0.0)
    mix_probability: Fraction = _doc("share of batches that are mixed at all", 1.0)
    mix_off_epoch: Count = _doc("images are mixed in the epochs before this one only, counted from 0; 0: in all", 0)
    cutmix_share: Fraction = _doc("share of mixed batches that get CutMix where both are on", 0.5)
    erasing: Fraction = _doc("probability of random erasing, per image", 0.0)
    views: Count = _doc(
        "0: what is done to one image is drawn anew in every epoch; N: each image has N views, and epochs take turns with them",
        0,
    )
    view_seed: Count = _doc("with views: the seed that they are drawn from, apart from the run's", 0)
    erasing_mode: ErasingMode = _doc("fill of the erased box (timm's names)", "pixel")

    def of_each_image(self, interpolation: Interpolation = "bilinear") -> TrainTransform:
        """The part of this section that is done to images one by one. Raises ValueError as `TrainTransform` does."""
        return TrainTransform(
            crop=self.crop,
            scale=self.scale,
            ratio=self.ratio,
            padding=self.padding,
            flip=self.flip,
            interpolation=interpolation,
            rand_augment=self.rand_augment,
            three_augment=self.three_augment,
            color_jitter=self.color_jitter,
        )


@with_config(_STRICT)
@dataclass(frozen=True)
class Teacher:
    name: str = _doc("timm name, or `none` to train the student alone", "none")
    weights: str = _changeable(
        "`pretrained` (timm's hub), a path, `train` (trained first, kept in OUT/teacher) or `random`", "pretrained"
    )
    initial_weights: str = _doc("with weights `train`: what it starts from, `random`, `pretrained` or a path", "random")
    epochs: Count = _doc("with weights `train`: its epochs; 0: as many as the student's", 0)
    class_map: str | None = _doc(
        "file of one line per class of the data: its number among the teacher's; `by_number`: names are not compared",
        None,
    )
    class_tokens: ClassTokens = _doc("what a region's logits are where the head reads class tokens only", "attend")
    evaluate: bool = _changeable("measure the teacher's top-1 on the validation shards before training", True)
    expected_top1: Annotated[float, Field(ge=0, le=100)] | None = _changeable(
        "stop before training if the measured one is off", None
    )
    tolerance: NonNegative = _changeable("how far off the expected top-1 the teacher may be, in percent points", 1.0)
    cache: str = _changeable(
        "folder of its outputs, made by pipelines/cache_teacher.py, to read instead of computing them; empty: computed",
        "",
    )
    precision: Literal["auto", "bf16"] = _doc("of its weights; auto: as the student's", "auto")
    model_kwargs: dict[str, Any] = _doc("more arguments for timm.create_model", {})


@with_config(_STRICT)
@dataclass(frozen=True)
class Student:
    name: str = _doc("timm name", "cifar_resnet8")
    initial_weights: str = _doc("`random`, `pretrained` or a path", "random")
    fresh_head: bool = _doc(
        "with a path: leave its classifier out, as that of other classes, and start with a fresh one", False
    )
    class_tokens: ClassTokens = _doc("what a region's logits are where the head reads class tokens only", "attend")
    batchnorm: BatchNormMode = _doc("statistics per process, over all processes, or fixed", "local")
    checkpoint_activations: bool = _doc("less memory for one more forward pass of the student", False)
    drop_rate: Fraction = _doc("dropout before the classifier", 0.0)
    drop_path_rate: Fraction = _doc("stochastic depth", 0.0)
    model_kwargs: dict[str, Any] = _doc("more arguments for timm.create_model", {})


@with_config(_STRICT)
@dataclass(frozen=True)
class Train:
    epochs: Positive = _doc("passes over the training shards", 100)
    global_batch_size: Positive = _doc("images per optimiser step, over all processes and accumulated micro-batches", 256)
    accumulate: Positive = _changeable("micro-batches per optimiser step", 1)
    mixed_precision: MixedPrecision = _doc("auto: what the launcher says", "auto")
    tf32: Literal["none", "convolutions", "all"] = _doc(
        "float32 on NVIDIA GPUs that is computed in TF32 (10 bits of mantissa); all: matrix products too, those of the losses"
        " among them",
        "convolutions",
    )
    cudnn_benchmark: bool = _changeable("on a GPU: let cuDNN try its algorithms and take the fastest", True)
    deterministic: bool = _doc(
        "on a GPU: algorithms that give the same bits in every run, where PyTorch has them; slower, no cudnn_benchmark", False
    )
    channels_last: bool = _doc("memory format of models and images, which sum in another order in the other one", True)
    compile: Literal["none", "student", "teacher", "both"] = _doc(
        "models that torch.compile compiles, at the first step: minutes that train.timeout_minutes counts", "none"
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = _doc("of torch.compile", "default")
    overlap_teacher: bool = _changeable("on a GPU: the teacher's forward pass beside the student's, where memory allows", False)
    clip_gradient_norm: NonNegative = _doc("largest norm of the gradient, 0 is off", 0.0)
    evaluate_every: Positive = _doc("epochs between evaluations; the last epoch is always evaluated", 1)
    evaluate_batch_size: Count = _changeable("images per process in evaluation; 0: as in training", 0)
    checkpoint_every: Count = _changeable(
        "optimiser steps between checkpoints inside an epoch; 0: at the end of each epoch only", 0
    )
    checkpoint_minutes: NonNegative = _changeable("minutes between checkpoints inside an epoch; 0: not by the clock", 0.0)
    keep_checkpoints: Positive = _changeable("newest checkpoints kept; the best one is kept beside them", 2)
    skip_nonfinite: Count = _changeable(
        "steps with a loss or gradient that is not finite that are skipped before the run stops", 0
    )
    timeout_minutes: Annotated[float, Field(gt=0)] = _changeable("without any progress the run ends with an error", 10.0)
    max_steps: Count = _changeable("stop after this many optimiser steps; 0: train all epochs", 0)


@with_config(_STRICT)
@dataclass(frozen=True)
class Optim:
    name: str = _doc("sgd, adamw, lamb, ... (timm's optimiser factory), or dot, which takes {delta: 0.09} in options", "sgd")
    learning_rate: Annotated[float, Field(gt=0)] = _doc("at the global batch size of this recipe", 0.1)
    weight_decay: NonNegative = _doc("L2 factor", 1e-4)
    decay_bias_and_norm: bool = _doc(
        "decay 1-d parameters too, and what timm's models name in no_weight_decay, as the papers do", True
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = _doc(
        "share of the learning rate that each layer of the student has of the one above it, as timm groups layers; 1: all"
        " have the whole rate",
        1.0,
    )
    layer_decay_min_scale: Fraction = _doc("with layer_decay: least share of a layer", 0.0)
    momentum: Fraction = _doc("of SGD and its like", 0.9)
    options: dict[str, Any] = _doc("more arguments of the optimiser, such as {nesterov: true} or {betas: [0.9, 0.95]}", {})


@with_config(_STRICT)
@dataclass(frozen=True)
class Schedule:
    name: Literal["step", "cosine", "constant"] = _doc("of the learning rate", "cosine")
    warmup_epochs: NonNegative = _doc("linear rise from 0", 0.0)
    decay_epochs: tuple[float, ...] = _doc("step: epochs after which the rate is multiplied by decay_factor", ())
    decay_factor: Fraction = _doc("step: the multiplier", 0.1)
    minimum: Fraction = _doc("cosine: last rate as a share of the first", 0.0)


@with_config(_STRICT)
@dataclass(frozen=True)
class Ema:
    enabled: bool = _doc("keep an average of the student's weights; it is then what is evaluated and exported", False)
    decay: Fraction = _doc("of the average, per step", 0.9999)
    warmup: bool = _doc("let the decay grow from 0 (timm's ModelEmaV3)", True)


@with_config(_STRICT)
@dataclass(frozen=True)
class Reporting:
    log_every: Positive = _changeable("optimiser steps between lines of metrics.jsonl", 50)
    trackers: tuple[str, ...] = _changeable("Accelerate's trackers by name: tensorboard, wandb, ...", ("tensorboard",))
    profile_steps: Count = _changeable("steps whose trace (for a browser) is written to OUT/profile, after 6 others", 0)
    page: bool = _changeable("draw OUT/report.html at the end, in less than a minute (docs/report.md)", True)
    gradient_shares: bool = _changeable(
        "log each loss term's share of the gradient norm (one more backward per term when logging)", False
    )


@with_config(_STRICT)
@dataclass(frozen=True)
class Recipe:
    out: str = _changeable("the run's folder", "runs/digits/distilled")
    seed: Count = _doc("the one seed: every random stream is derived from it", 0)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    loss: dict[str, dict[str, Any]] = field(default_factory=lambda: {"cross_entropy": {"weight": 1.0}})
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    ema: Ema = field(default_factory=Ema)
    report: Reporting = field(default_factory=Reporting)


@with_config(_STRICT)
@dataclass(frozen=True)
class TermSchedule:
    """The keys that every entry of the `loss` section has beside its loss's own options."""

    weight: NonNegative = _doc("multiplier of the term", 1.0)
    warmup_epochs: NonNegative = _doc("weight rises in whole epochs, (epoch + 1) / warmup_epochs, as in mdistiller", 0.0)
    start_epoch: NonNegative = _doc("weight is 0 before this epoch", 0.0)
    stop_epoch: NonNegative | None = _doc("weight is 0 from this epoch on; null: never", None)
    final_weight: NonNegative | None = _doc("weight at the end of training; null: constant", None)
    decay: Literal["linear", "cosine"] = _doc("how the weight goes to final_weight", "linear")
    decay_start_epoch: NonNegative = _doc("epoch from which it goes there; constant before", 0.0)
