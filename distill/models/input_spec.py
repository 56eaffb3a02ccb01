"""What a model wants to be fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from distill.protocols import InputSpec, Interpolation


def input_spec_of(model: nn.Module) -> InputSpec:
    """The `InputSpec` in the `pretrained_cfg` of this instance. ValueError where it is not three-channel images."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return spec_of_cfg(cfg, type(model).__name__)


def spec_of_cfg(cfg: Mapping[str, Any] | None, name: str) -> InputSpec:
    """The `InputSpec` in a timm cfg; `name` is for the error."""
    if not cfg or "input_size" not in cfg:
        raise ValueError(f"{name} has no pretrained_cfg with an input_size; register it with generate_default_cfgs")
    channels, height, width = cfg["input_size"]
    if channels != 3:
        raise ValueError(f"{name} takes {channels} channels; only RGB images are served")
    interpolation = cfg.get("interpolation", "bicubic")
    if interpolation not in get_args(Interpolation):
        served = " and ".join(get_args(Interpolation))
        raise ValueError(f"{name} asks for {interpolation!r} interpolation; only {served} are served")
    red, green, blue = (float(v) for v in cfg["mean"])
    mean = (red, green, blue)
    red, green, blue = (float(v) for v in cfg["std"])
    return InputSpec(height, width, mean, (red, green, blue), interpolation, float(cfg.get("crop_pct") or 1.0))
