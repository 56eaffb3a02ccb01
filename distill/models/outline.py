"""An architecture in little memory and time, for looking at it: large weights are drawn once per shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from distill.models.build import create_model

LARGE = 2**18
"""Parameters with at least so many values share one tensor per shape: 1 MiB in float32. All others are timm's own, so norms,
biases, LayerScales and small heads are what the architecture makes them."""


def create_outline(name: str, **kwargs: Any) -> nn.Module:
    """The architecture as `create_model` makes it, its large parameters of one shape being one tensor of noise.

    What layers do to shapes, grids and regions is that of the plain model; 6.7 billion parameters take 0.5 GiB.
    `count_parameters` counts them. ValueError as in `create_model`.
    """
    with _Uninitialised():
        model = create_model(name, **kwargs)
    drawn: dict[tuple[int, ...], nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.numel() < LARGE:
                continue
            shape = tuple(parameter.shape)
            if shape not in drawn:
                drawn[shape] = nn.Parameter(torch.randn(shape) * parameter[0].numel() ** -0.5)
            setattr(module, key, drawn[shape])
    return model


class _Uninitialised(TorchFunctionMode):
    """Large parameters stay as the allocator gave them: memory that nobody writes to is never taken from the system."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__.endswith("_") and not func.__name__.endswith("__"):  # in place: normal_, nn.init.trunc_normal_, ...
            target = next(iter((*args, *kwargs.values())), None)
            if isinstance(target, nn.Parameter) and target.numel() >= LARGE:
                return target
        return func(*args, **kwargs)


def count_parameters(model: nn.Module) -> int:
    """Parameters of the architecture, made by `create_outline` or not: large ones that share a tensor are counted each."""
    every = model.named_parameters(remove_duplicate=False)
    large = sum(parameter.numel() for _, parameter in every if parameter.numel() >= LARGE)
    return large + sum(parameter.numel() for parameter in model.parameters() if parameter.numel() < LARGE)
