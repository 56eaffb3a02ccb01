"""The arguments that timm's train.py saves beside a run (args.yaml), as recipe keys, and what of them has no counterpart here.

Source: train.py of timm's repository (2026-08), and what timm 1.0.31 does with its arguments. An argument that is not listed
here is named like those without a counterpart, so nothing is lost without a word.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from distill.data.augment.policy import parse_rand_augment
from distill.errors import RequestError
from distill.yaml12 import parse_yaml

NO_RESULT = frozenset(
    """
    config data data_dir dataset train_split val_split train_num_samples val_num_samples dataset_download input_img_mode
    input_key target_key dataset_trust_remote_code num_classes resume no_resume_opt validation_batch_size fuser device
    no_ddp_bb synchronize_step local_rank device_modules opt_foreach worker_seeding log_interval recovery_interval
    checkpoint_hist workers save_images pin_mem no_prefetcher output experiment eval_metric use_multi_epochs_loader
    log_wandb wandb_project wandb_tags wandb_resume_id model_ema_force_cpu kd_loss_type lr_cycle_mul lr_cycle_decay
    patience_epochs lr_noise_pct lr_noise_std kd_student_feature_dim kd_teacher_feature_dim
    """.split()  # noqa: SIM905 (one word a line would fill a screen)
)
"""Arguments that say where things are, how fast they go or what is logged, and settings of others that are named themselves."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "class_map": ("",),
    "gp": (None,),
    "in_chans": (None, 3),
    "mean": (None,),
    "std": (None,),
    "fast_norm": (False,),
    "head_init_scale": (None,),
    "head_init_bias": (None,),
    "torchscript": (False,),
    "model_dtype": (None, "float32"),
    "layer_decay_no_opt_scale": (None,),
    "lr_noise": (None,),
    "lr_cycle_limit": (0, 1),
    "lr_k_decay": (1.0,),
    "lr_decay_fn": (None,),
    "lr_stable_timescale": (None,),
    "epoch_repeats": (0,),
    "start_epoch": (None, 0),
    "cooldown_epochs": (0,),
    "vflip": (0,),
    "color_jitter_prob": (None,),
    "grayscale_prob": (None, 0),
    "gaussian_blur_prob": (None, 0),
    "aug_splits": (0,),
    "jsd_loss": (False,),
    "bce_pos_weight": (None,),
    "recount": (1,),
    "resplit": (False,),
    "cutmix_minmax": (None,),
    "mixup_mode": ("batch",),
    "drop_block": (None, 0),
    "split_bn": (False,),
    "tta": (0,),
    "train_img_sizes": (None,),
    "train_batches_per_epoch": (None,),
    "naflex_loader": (False,),
}
"""Arguments without a counterpart -> the values at which they do nothing."""

BELONG = {
    "train_img_sizes": [
        *("train_batch_sizes", "train_size_probs", "train_size_schedule", "train_size_schedule_spread"),
        *("train_size_random_mix", "variable_batch_loss_scale"),
    ],
    "naflex_loader": [
        *("naflex_train_seq_lens", "naflex_max_seq_len", "naflex_patch_sizes", "naflex_patch_size_probs"),
        *("naflex_loss_scale", "naflex_patchify_channels_first"),
    ],
}
"""Arguments without a counterpart -> those that do nothing without them, and are not named on their own."""


class Converted(NamedTuple):
    """timm's arguments as a recipe's."""

    values: dict[str, Any]
    """By recipe key, as `section.field`; `loss` is the whole section."""
    lost: list[str]
    """A line for each argument that has a value and no counterpart."""
    otherwise: list[str]
    """A line for each argument whose counterpart does it in another way."""


class Arguments:
    """The values of args.yaml, which of them were read, and what is said of them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._read: dict[str, Any] = dict.fromkeys(NO_RESULT)
        self.lost: list[str] = []
        self.otherwise: list[str] = []

    def take(self, name: str, absent: Any = None) -> Any:
        """The argument's value; `absent` where the version of timm had no such argument."""
        self._read[name] = value = self._values.get(name, absent)
        return value

    def lose(self, name: str, why: str = "no counterpart") -> None:
        """Says that the argument's value is lost."""
        self.lost.append(f"{name}: {self._named(name)}: {why}")

    def differ(self, name: str, how: str) -> None:
        """Says what is done otherwise here than by the argument's value."""
        self.otherwise.append(f"{name}: {self._named(name)}: {how}")

    def _named(self, name: str) -> Any:
        """The value that counts: the file's, or what `take` was told of a file without it."""
        return self._values[name] if name in self._values else self._read.get(name)

    def lose_the_rest(self) -> None:
        """Says of everything that was not read, and does something, that it is lost."""
        for name, idle in NEUTRAL.items():
            self._read |= dict.fromkeys((name, *BELONG.get(name, ())))
            if name in self._values and self._values[name] not in idle:
                self.lose(name)
        for name in self._values:
            if name not in self._read:
                self.lose(name, "unknown here")


def read_arguments(path: Path) -> dict[str, Any]:
    """The plain data of an args.yaml. Raises RequestError for a file that is none."""
    if not path.is_file():
        raise RequestError(f"--from-timm-args {path}: no such file; it is args.yaml in the output folder of timm's train.py")
    try:
        found = parse_yaml(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"--from-timm-args {path}: not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found.get("model"):
        raise RequestError(f"--from-timm-args {path}: has no `model`; it must be the args.yaml that timm's train.py saves")
    return found


def convert_file(path: Path, global_batch_size: int | None) -> Converted:
    """The recipe keys of an args.yaml, as `converted` has them. Raises RequestError for a file that timm cannot have saved."""
    values = read_arguments(path)
    try:
        return converted(values, global_batch_size)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise RequestError(f"--from-timm-args {path}: a value has another type than timm saves: {error}") from None


def converted(values: Mapping[str, Any], global_batch_size: int | None = None) -> Converted:
    """The recipe keys of timm's arguments.

    global_batch_size: what the command line gives; args.yaml does not say on how many processes the run was, each of which has
    `batch_size` images. None: one process.
    """
    asked = Arguments(values)
    found = {"seed": asked.take("seed", 42), "train.evaluate_every": asked.take("val_interval", 1)}
    for section in (_models, _input, _augmentation, _mixing):
        found |= section(asked)
    found |= _training(asked, global_batch_size)
    found |= _optimiser(asked, found["train.global_batch_size"])
    found |= _schedule(asked, found["optim.learning_rate"])
    found["loss"] = _losses(asked, bool(found["augment.mixup"] or found["augment.cutmix"]))
    found |= {"teacher.name": asked.take("kd_model_name")} if "kd" in found["loss"] else {"teacher.name": "none"}
    found |= {"data.train": "data/imagenet/train", "data.val": "data/imagenet/val", "data.prepare": "none"}
    found["out"] = f"runs/{values.get('experiment') or values['model']}"
    asked.lose_the_rest()
    return Converted(found, asked.lost, asked.otherwise)


def header(found: Converted, file: Path) -> str:
    """The comments above a converted recipe: what to do with it, and what it has not of timm's run."""
    lines = [
        "Command:   accelerate launch pipelines/imagenet.py --recipe THIS_FILE --train SHARDS --val SHARDS",
        f"Source:    {file}, saved by timm's train.py. Prepare its data by shards/prepare.py.",
        *(f"Lost:      {line}" for line in found.lost),
        *(f"Differs:   {line}" for line in found.otherwise),
    ]
    indent = "#" + 12 * " "
    return "".join(textwrap.fill(f"# {line}", 118, subsequent_indent=indent, break_on_hyphens=False) + "\n" for line in lines)


def _models(asked: Arguments) -> dict[str, Any]:
    kwargs = {name: value for name in ("bn_momentum", "bn_eps") if (value := asked.take(name)) is not None}
    drop_path, drop_connect = asked.take("drop_path"), asked.take("drop_connect")  # the latter is the former's old name
    found: dict[str, Any] = {
        "student.name": asked.take("model"),
        "student.drop_rate": asked.take("drop") or 0.0,
        "student.drop_path_rate": drop_path or drop_connect or 0.0,
        "student.model_kwargs": {**(asked.take("model_kwargs") or {}), **kwargs},
        "student.checkpoint_activations": asked.take("grad_checkpointing", False),
        "student.batchnorm": "sync" if asked.take("sync_bn", False) else "local",
        "student.initial_weights": "pretrained" if asked.take("pretrained", False) else "random",
    }
    if file := asked.take("pretrained_path"):
        found |= {"student.initial_weights": file, "student.fresh_head": True}
        asked.differ("pretrained_path", "the classifier starts afresh, where timm fits the file's one where it can")
    if file := asked.take("initial_checkpoint"):
        found |= {"student.initial_weights": file, "student.fresh_head": False}
    if asked.take("dist_bn", "reduce") == "reduce" and found["student.batchnorm"] == "local":
        asked.differ("dist_bn", "evaluation takes the BatchNorm statistics of the first process, not the mean of all")
    return found


def _input(asked: Arguments) -> dict[str, Any]:
    size, side = asked.take("input_size"), asked.take("img_size") or 0
    if size and size[0] == 3 and size[1] == size[2]:
        side = size[1]
    elif size:
        asked.lose("input_size", "images are square and RGB here")
    evaluation, training = asked.take("interpolation") or "auto", asked.take("train_interpolation", "random")
    if evaluation == "auto" and training in ("bilinear", "bicubic"):
        evaluation = training
        asked.differ("train_interpolation", "evaluation interpolates so too, where timm does as the model was trained")
    elif training != evaluation:
        asked.differ("train_interpolation", f"training interpolates as evaluation ({evaluation})")
    return {"data.image_size": side, "data.crop_fraction": asked.take("crop_pct") or 0.0, "data.interpolation": evaluation}


def _augmentation(asked: Arguments) -> dict[str, Any]:
    found: dict[str, Any] = {
        "augment.crop": "random_resized",
        "augment.scale": list(asked.take("scale") or (0.08, 1.0)),
        "augment.ratio": list(asked.take("ratio") or (3 / 4, 4 / 3)),
        "augment.flip": asked.take("hflip", 0.5),
        "augment.erasing": asked.take("reprob", 0.0),
        "augment.erasing_mode": asked.take("remode", "pixel"),
        **_policy(asked),
    }
    if asked.take("train_crop_mode") not in (None, "", "rrc"):
        asked.lose("train_crop_mode", "random_resized is taken")
    repeats = asked.take("aug_repeats", 0) or 1
    if repeats != int(repeats):
        asked.lose("aug_repeats", f"whole numbers only; {math.floor(repeats)} is taken")
    found["augment.repeats"] = max(1, int(repeats))
    if asked.take("no_aug", False):
        found |= {"augment.crop": "resize", "augment.flip": 0.0, "augment.erasing": 0.0}
        found |= {"augment.rand_augment": None, "augment.three_augment": False, "augment.color_jitter": 0.0}
        asked.differ("no_aug", "the whole image is resized, where timm resizes its shorter side and cuts the centre out")
    return found


def _policy(asked: Arguments) -> dict[str, Any]:
    """What is done to colours: timm's `aa`, beside which it drops colour jitter unless that is 3-Augment."""
    policy, jitter = asked.take("aa"), asked.take("color_jitter", 0.4)
    if isinstance(jitter, (list, tuple)):
        if len(set(jitter)) > 1 or len(jitter) != 3:
            asked.lose("color_jitter", "one share for brightness, contrast and saturation, without hue; the first is taken")
        jitter = jitter[0]
    if not policy:
        return {"augment.color_jitter": jitter or 0.0}
    if policy == "3a":
        return {"augment.three_augment": True, "augment.color_jitter": jitter or 0.0}
    try:
        parse_rand_augment(policy)
    except ValueError:
        asked.lose("aa")
        return {}
    return {"augment.rand_augment": policy}


def _mixing(asked: Arguments) -> dict[str, Any]:
    return {
        "augment.mixup": asked.take("mixup", 0.0),
        "augment.cutmix": asked.take("cutmix", 0.0),
        "augment.mix_probability": asked.take("mixup_prob", 1.0),
        "augment.cutmix_share": asked.take("mixup_switch_prob", 0.5),
        "augment.mix_off_epoch": asked.take("mixup_off_epoch", 0),
    }


def _training(asked: Arguments, global_batch_size: int | None) -> dict[str, Any]:
    accumulate = max(1, asked.take("grad_accum_steps", 1))
    one = asked.take("batch_size", 128) * accumulate
    if global_batch_size is None:
        asked.differ("batch_size", "of each process, of unknown number; one is taken here: give --train.global_batch_size")
    precision = {"float16": "fp16", "bfloat16": "bf16"}.get(asked.take("amp_dtype", "float16"), "fp16")
    backend, mode = asked.take("torchcompile"), asked.take("torchcompile_mode") or "default"
    if backend and (backend != "inductor" or mode not in ("default", "reduce-overhead", "max-autotune")):
        asked.lose("torchcompile", f"{mode} of this backend; inductor's default is taken")
        mode = "default"
    if asked.take("clip_mode", "norm") != "norm" and asked.take("clip_grad") is not None:
        asked.lose("clip_mode", "the gradient is not clipped")
    return {
        "train.global_batch_size": global_batch_size or one,
        "train.accumulate": accumulate,
        "train.mixed_precision": precision if asked.take("amp", False) else "no",
        "train.tf32": "all",  # train.py switches it on
        "train.channels_last": asked.take("channels_last", False),
        "train.compile": "student" if backend else "none",
        "train.compile_mode": mode,
        "train.clip_gradient_norm": (asked.take("clip_grad") or 0.0) if asked.take("clip_mode", "norm") == "norm" else 0.0,
        "ema.enabled": asked.take("model_ema", False),
        "ema.decay": asked.take("model_ema_decay", 0.9998),
        "ema.warmup": asked.take("model_ema_warmup", False),
    }


def _optimiser(asked: Arguments, batch: int) -> dict[str, Any]:
    name = asked.take("opt", "sgd").lower()
    options = dict(asked.take("opt_kwargs") or {})
    for option in ("eps", "betas"):
        if (value := asked.take(f"opt_{option}")) is not None:
            options[option] = value
    if name in ("sgd", "nesterov", "momentum"):  # timm's `sgd` is Nesterov's
        name, options = "sgd", {"nesterov": name != "momentum", **options}
    rate, base, size = asked.take("lr"), asked.take("lr_base", 0.1), asked.take("lr_base_size", 256)
    scale = asked.take("lr_base_scale") or ("sqrt" if any(part in name for part in ("ada", "lamb")) else "linear")
    return {
        "optim.name": name,
        "optim.learning_rate": rate or base * (batch / size) ** (0.5 if scale == "sqrt" else 1),
        "optim.weight_decay": asked.take("weight_decay", 2e-5),
        "optim.decay_bias_and_norm": False,  # what timm's factory does
        "optim.momentum": asked.take("momentum", 0.9),
        "optim.layer_decay": asked.take("layer_decay") or 1.0,
        "optim.layer_decay_min_scale": asked.take("layer_decay_min_scale") or 0.0,
        "optim.options": options,
    }


def _schedule(asked: Arguments, peak: float) -> dict[str, Any]:
    name, epochs, warmup = asked.take("sched", "cosine"), asked.take("epochs", 300), asked.take("warmup_epochs", 5)
    prefix = warmup if asked.take("warmup_prefix", False) else 0
    every, factor = asked.take("decay_epochs") or 90, asked.take("decay_rate", 0.1)
    milestones, least = asked.take("decay_milestones") or (), asked.take("min_lr", 0.0)
    by_updates = asked.take("sched_on_updates", False)
    found: dict[str, Any] = {"train.epochs": epochs + prefix, "schedule.name": name, "schedule.warmup_epochs": warmup}
    if name == "cosine":
        found["schedule.minimum"] = least / peak
        if warmup and not prefix:
            asked.differ("warmup_prefix", "the cosine begins at its peak after the warm-up; timm's began with the run")
    elif name in ("step", "multistep"):
        # timm's step counts epochs from the start of the run, or from the end of a prefix; its multistep is an epoch early
        steps = [m - 1 for m in milestones]
        if name == "step":
            steps = [every * (i + 1) for i in range(math.ceil(epochs / every) - 1)]
        found |= {"schedule.name": "step", "schedule.decay_epochs": [prefix + each for each in steps]}
        found["schedule.decay_factor"] = factor
    elif name != "constant":
        found |= {"schedule.name": "constant"} | ({"schedule.warmup_epochs": 0} if name == "none" else {})
        if name != "none":
            asked.lose("sched", "a constant rate is taken")
    if warmup and asked.take("warmup_lr", 1e-5):
        asked.differ("warmup_lr", "the warm-up rises from 0")
    if not by_updates and (warmup or name == "cosine"):
        asked.differ("sched_on_updates", "the rate moves at every step")
    asked.take("warmup_lr")
    return found


def _losses(asked: Arguments, mixed: bool) -> dict[str, dict[str, Any]]:
    smoothing, binary = asked.take("smoothing", 0.1), asked.take("bce_loss", False)
    threshold, summed = asked.take("bce_target_thresh"), asked.take("bce_sum", False)
    entropy: dict[str, Any] = {"label_smoothing": smoothing}
    if binary and (mixed or smoothing):  # without either train.py takes plain cross-entropy
        entropy |= {"binary": True, "threshold": threshold, "sum_classes": summed}
    elif binary:
        asked.differ("bce_loss", "plain cross-entropy, as timm without mixing and smoothing")
    teacher, kind = asked.take("kd_model_name"), asked.take("kd_distill_type", "logit")
    task, distilled = asked.take("task_loss_weight"), asked.take("distill_loss_weight")
    temperature, token = asked.take("kd_temperature", 4.0), asked.take("kd_token_distill_type", "soft")
    if not teacher:
        return {"cross_entropy": entropy}
    if kind != "logit":
        asked.lose("kd_distill_type", f"{token} token distillation" if kind == "token" else "pooled features with a projection")
        asked.lose("kd_model_name", "the student is trained alone")
        return {"cross_entropy": entropy}
    if distilled is None:
        distilled = 1.0 if task is None else 1.0 - task
    entropy["weight"] = 1.0 if task is None else task
    return {"cross_entropy": entropy, "kd": {"weight": distilled, "temperature": temperature}}
