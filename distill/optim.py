"""Parameter groups, the optimiser (timm's factory, or DOT), and schedules as pure functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.dot import DOT
from distill.protocols import Progress

FUSED = ("sgd", "adam", "adamw")
"""Optimisers whose step PyTorch has in one kernel, which can hold a poisoned step back too (`nonfinite.py`); used on GPUs."""

Schedule = Callable[[Progress], float]


def parameter_groups(
    module: nn.Module,
    weight_decay: float,
    decay_bias_and_norm: bool,
    layer_decay: float = 1.0,
    layer_decay_min_scale: float = 0.0,
) -> list[dict[str, Any]]:
    """The trained parameters of `module`: one group that is decayed and, where there are any, one that is not; with
    `layer_decay` below 1 such a pair for each share of the learning rate, which is the group's `lr_scale` (`layer_scales`).

    The papers decay every parameter; most recipes since leave biases and normalisation (1-d parameters) alone, and with them
    what a timm model names in `no_weight_decay`: position embeddings, class tokens, tables of relative positions. What
    `module.no_weight_decay()` itself names is never decayed.
    """
    spared: set[str] = getattr(module, "no_weight_decay", set)()
    if not decay_bias_and_norm:
        by_models = _spared_by_models(module)
        spared = spared | {name for name, _ in module.named_parameters() if any(fnmatchcase(name, each) for each in by_models)}
    scales = layer_scales(module, layer_decay, layer_decay_min_scale) if layer_decay < 1 else {}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        of_norm_or_bias = parameter.ndim <= 1 or name.endswith(".bias")
        spare = name in spared or (of_norm_or_bias and not decay_bias_and_norm)
        scale = scales.get(name, 1.0)
        fresh = {"params": [], "weight_decay": 0.0 if spare else weight_decay, **({"lr_scale": scale} if scales else {})}
        groups.setdefault((scale, spare), fresh)["params"].append(parameter)
    # from the head down, whatever parameter comes first: the log has the first group's rate, which is then the whole one
    return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], key[1]))]


def layer_scales(module: nn.Module, layer_decay: float, min_scale: float = 0.0) -> dict[str, float]:
    """Each parameter's share of the learning rate, by name, for what lies in timm's models inside of `module`.

    A model's layers are those of its own `group_matcher`: blocks one by one, the embedding below them, the head on top. The
    head has share 1, every layer below `layer_decay` times that of the one above it, and none less than `min_scale`. What is
    in no such model (projectors) has the whole rate. Raises ValueError where there is no model that names its layers.
    Source: BEiT; the shares are those of timm's `param_groups_layer_decay`.
    """
    from timm.models import group_parameters

    scales: dict[str, float] = {}
    models: list[str] = []
    for prefix, model in module.named_modules():
        if not hasattr(model, "group_matcher") or any(prefix.startswith(f"{outer}.") for outer in models):
            continue
        models.append(prefix)
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        top = max(layers.values())
        start = f"{prefix}." if prefix else ""
        scales |= {f"{start}{name}": max(min_scale, layer_decay ** (top - layer)) for name, layer in layers.items()}
    if not models:
        raise ValueError("optim.layer_decay: the student does not name its layers (timm's group_matcher); say 1")
    return scales


def _spared_by_models(module: nn.Module) -> set[str]:
    """Names, or patterns of names, that models inside `module` keep from weight decay, in timm's way."""
    return {
        f"{prefix}.{name}"
        for prefix, model in module.named_modules()
        if prefix and callable(names := getattr(model, "no_weight_decay", None))
        for name in names()
    }


def create_optimizer(
    module: nn.Module,
    name: str,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    decay_bias_and_norm: bool,
    layer_decay: float = 1.0,
    layer_decay_min_scale: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimiser of timm's factory, or `dot`, over the trained parameters of `module`.

    timm's `sgd` is Nesterov unless told otherwise; here `sgd` is plain momentum, as the papers have it, and
    `options={"nesterov": True}` asks for the other. Raises ValueError for an unknown name or option.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = ["dot", *list_optimizers()]
    if name not in known:
        raise ValueError(f"optim.name: {name!r} is unknown to timm; allowed: {', '.join(known)}")
    arguments = {"nesterov": False, **(options or {})} if name == "sgd" else dict(options or {})
    if name in FUSED and all(p.device.type == "cuda" for p in module.parameters()):
        arguments.setdefault("fused", True)
    groups = parameter_groups(module, weight_decay, decay_bias_and_norm, layer_decay, layer_decay_min_scale)
    try:
        make = DOT if name == "dot" else partial(create_optimizer_v2, opt=name)
        optimizer = make(groups, lr=learning_rate, weight_decay=weight_decay, momentum=momentum, **arguments)
    except TypeError as error:
        raise ValueError(f"optim.options: {arguments} do not fit {name!r}: {error}") from None
    if isinstance(optimizer, torch.optim.SGD):
        _begin_momentum(optimizer)
    return optimizer


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Momentum of zeros for fused SGD, which gives PyTorch's own first step, bit for bit.

    PyTorch makes it of unwritten memory in the first step and leaves it so where the device skips that step: the next one
    would add whatever lies there. fp16's first steps are often skipped.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def learning_rate_schedule(
    name: str,
    *,
    peak: float,
    warmup_epochs: float = 0.0,
    decay_epochs: Sequence[float] = (),
    decay_factor: float = 0.1,
    minimum: float = 0.0,
) -> Schedule:
    """Learning rate of the step about to be made: `step`, `cosine` or `constant`, after a linear warm-up from 0.

    `step` multiplies by `decay_factor` after each of `decay_epochs` whole epochs (30 means: the 31st epoch is the first
    at the lower rate, which is mdistiller's `epoch > stage` with epochs from 1). `cosine` falls to `minimum * peak`.
    """

    def learning_rate(progress: Progress) -> float:
        """The rate of the step that is about to be made."""
        epoch = progress.step / progress.steps_per_epoch
        if epoch < warmup_epochs:
            # the first step already moves: (step + 1), not step
            return peak * (progress.step + 1) / (warmup_epochs * progress.steps_per_epoch)
        if name == "step":
            return peak * decay_factor ** sum(epoch >= e for e in decay_epochs)
        if name == "constant":
            return peak
        warmup_steps = warmup_epochs * progress.steps_per_epoch
        done = (progress.step - warmup_steps) / max(1.0, progress.total_steps - warmup_steps)
        return peak * (minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    return learning_rate


def weight_schedule(
    weight: float,
    *,
    warmup_epochs: float = 0.0,
    start_epoch: float = 0.0,
    stop_epoch: float | None = None,
    final_weight: float | None = None,
    decay: str = "linear",
    decay_start_epoch: float = 0.0,
) -> Schedule:
    """Weight of a loss term: constant, risen over whole epochs, started late, stopped early, or moved to `final_weight`.

    The rise is piecewise constant, `min((epoch + 1) / warmup_epochs, 1)` with epochs from 0: the released code of DKD and
    SDD. It counts from `start_epoch`. The move to `final_weight` goes on step by step from `decay_start_epoch` (or
    `start_epoch`, the later) to the end; code that moves by epochs has at epoch e, from 1, what this has at its end.
    """

    def at(progress: Progress) -> float:
        """The weight in the step that is about to be made."""
        since = progress.epoch - start_epoch
        if since < 0 or (stop_epoch is not None and progress.epoch >= stop_epoch):
            return 0.0
        rise = min(1.0, (since + 1) / warmup_epochs) if warmup_epochs else 1.0
        if final_weight is None:
            return weight * rise
        begin = max(start_epoch, decay_start_epoch) * progress.steps_per_epoch
        done = min(1.0, max(0.0, progress.step - begin) / max(1.0, progress.total_steps - begin))
        share = done if decay == "linear" else 0.5 * (1 - math.cos(math.pi * done))
        return rise * (weight + (final_weight - weight) * share)

    return at
