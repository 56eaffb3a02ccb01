"""The activation that ends a stage, found by watching one forward pass of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.taps import Tap
from distill.protocols import Affine


class Call(NamedTuple):
    """One call of a module that reads a map and gives one."""

    module: nn.Module
    read: int
    """A number for the tensor, the same as long as it is the same object."""
    gave: int
    version: int
    """Writes that what it gave had seen until then: a sum in place afterwards changes the values, not the object."""
    depth: int
    """Convolutions that led to what it gave, one after the other, as far as modules passed it on."""
    shape: torch.Size


@dataclass(frozen=True)
class Preactivation:
    """A stage's map before the activation that ends it."""

    name: str = ""
    """The module to tap; empty where the stage's map is its own pre-activation."""
    output: bool = False
    """Whether it is what the module gives, not what it reads."""
    pool: str = ""
    """The max pooling that is applied to it: it commutes with the activation, which never falls."""
    norm: Affine | None = None
    """The normalisation that it comes from."""
    refusal: str = ""
    """Why it cannot be had; empty where it can."""

    def tap(self) -> Tap:
        """A tap on it. It copies: activations often write into what they read."""
        return Tap(self.name, "output" if self.output else "input")


class Trace:
    """The calls of a model's modules in one forward pass in evaluation mode, in the order in which they ended."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self._numbers = count()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the calls inside the block; its hooks are gone afterwards."""
        handles = [module.register_forward_hook(self._note) for module in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        given = args[0] if args else None
        if not (isinstance(given, Tensor) and isinstance(output, Tensor) and given.ndim == output.ndim == 4):
            return
        read, depth = self.number(given), getattr(given, "_depth", 0) + isinstance(module, nn.Conv2d)
        depth = max(depth, getattr(output, "_depth", 0))
        output._depth = depth  # type: ignore[attr-defined]
        self.calls.append(Call(module, read, self.number(output), output._version, depth, output.shape))

    def number(self, tensor: Tensor) -> int:
        """The number of this tensor object; it lives as long as the tensor, so that the trace keeps no memory alive."""
        if not hasattr(tensor, "_number"):
            tensor._number = next(self._numbers)  # type: ignore[attr-defined]
        return int(tensor._number)  # type: ignore[attr-defined]

    def name(self, module: nn.Module) -> str:
        """The module's first name."""
        return self.names[module][0]

    def inside(self, scope: str) -> list[Call]:
        """The calls of modules inside the module called `scope`."""
        return [call for call in self.calls if not scope or self.name(call.module).startswith(f"{scope}.")]


def find_preactivation(trace: Trace, stage_map: Tensor) -> Preactivation:
    """The way to the pre-activation of a stage, given its map as the traced pass gave it. There are three cases:

    1. An activation gave the map, and a max pooling may have followed. The pre-activation is what the activation read.
    2. A block's sum gave the map, and a BatchNorm and an activation read it next (pre-activation nets). The pre-activation is
       what that BatchNorm gives, as in the published code.
    3. No activation ends the stage. The pre-activation is the map itself.

    It is refused where the activation that ends the stage is no module, or is a module that is used more than once.
    """
    own = trace.number(stage_map)
    pooled = [call for call in trace.calls if call.gave == own and isinstance(call.module, nn.MaxPool2d)]
    source = pooled[-1].read if pooled else own
    ends = [i for i, call in enumerate(trace.calls) if call.gave == source and is_activation(call.module)]
    if ends and (pooled or trace.calls[ends[-1]].version == stage_map._version):
        return replace(_before(trace, ends[-1]), pool=trace.name(pooled[-1].module) if pooled else "")
    for i, call in enumerate(trace.calls):
        if call.read == own and isinstance(call.module, _BatchNorm) and _activated(trace, i):
            return _after(trace, call.module)
    if bool((stage_map >= 0).all()) and bool(stage_map.any()):
        return Preactivation(refusal="its map is nowhere negative, but no module for an activation gave it")
    givers = [call for call in trace.calls if call.gave == own and call.gave != call.read]
    norm = None
    if givers and isinstance(givers[0].module, _BatchNorm):
        norm = _affine(givers[0].module)
    elif givers:
        norm = _deepest_norm(trace.inside(trace.name(givers[0].module)), stage_map.shape)
    return Preactivation(norm=norm)


def is_activation(module: nn.Module) -> bool:
    """Whether a module without weights changes every element by itself: not an identity, a pool or a softmax."""
    if any(True for _ in (*module.children(), *module.parameters(), *module.buffers())):
        return False
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(1, 8, 4, 4, generator=generator)
    order = torch.randperm(x.numel(), generator=generator)
    try:
        y, shuffled = module(x.clone()), module(x.flatten()[order].view_as(x))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    same = isinstance(y, Tensor) and y.shape == x.shape and not torch.equal(y, x)
    return same and torch.equal(shuffled.flatten(), y.flatten()[order])


def _before(trace: Trace, position: int) -> Preactivation:
    """What the activation of this call reads, and the BatchNorm on the way to it that has the most convolutions behind it."""
    call = trace.calls[position]
    refusal = _shared(trace, call.module, position)
    name = trace.name(call.module)
    scope = name.rpartition(".")[0]
    around = next((module for module, names in trace.names.items() if names[0] == scope), None)
    if isinstance(around, _BatchNorm):  # timm's BatchNormAct2d
        return Preactivation(name, norm=_affine(around), refusal=refusal)
    earlier = Trace.inside(trace, scope)
    before = earlier[: earlier.index(call)]
    return Preactivation(name, norm=_deepest_norm(before, call.shape), refusal=refusal)


def _after(trace: Trace, norm: _BatchNorm) -> Preactivation:
    """What this BatchNorm gives, before the activation that may be part of its module."""
    name = trace.name(norm)
    acts = [child for child, module in norm.named_children() if is_activation(module)]
    refusal = _shared(trace, norm, len(trace.calls))
    if acts:
        return Preactivation(f"{name}.{acts[0]}", norm=_affine(norm), refusal=refusal)
    return Preactivation(name, output=True, norm=_affine(norm), refusal=refusal)


def _activated(trace: Trace, position: int) -> bool:
    """Whether an activation reads what the BatchNorm of this call gives, or is part of it."""
    call = trace.calls[position]
    inner = any(is_activation(module) for module in call.module.children())
    return inner or any(later.read == call.gave and is_activation(later.module) for later in trace.calls[position + 1 :])


def _shared(trace: Trace, module: nn.Module, position: int) -> str:
    """Why a tap on this module would keep the wrong tensor; empty where it would not."""
    again = any(call.module is module for call in trace.calls[position + 1 :])
    if again or len(trace.names[module]) > 1:
        return f"its activation {trace.name(module)} is used again elsewhere"
    return ""


def _deepest_norm(calls: Sequence[Call], shape: torch.Size) -> Affine | None:
    """The BatchNorm of maps of this shape that has the most convolutions behind it; a shortcut's has fewer.

    None where two have as many (parallel branches), and where a convolution comes after it.
    """
    fitting = [call for call in calls if call.shape == shape]
    deepest = max((call.depth for call in fitting), default=0)
    norms = {call.module for call in fitting if call.depth == deepest and isinstance(call.module, _BatchNorm)}
    return _affine(norms.pop()) if len(norms) == 1 else None


def _affine(norm: nn.Module) -> Affine | None:
    """Copies of scale and shift; None for a normalisation without them."""
    weight, bias = norm.weight, norm.bias
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        return None
    return Affine(weight.detach().cpu().clone(), bias.detach().cpu().clone())
