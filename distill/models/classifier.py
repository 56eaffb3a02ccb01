"""The place of a model's embedding: what its last linear layer reads, found by watching its head run.

A model without a classifier has no such layer: its head itself gives the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.region_logits.layout import Features, TimmModel
from distill.models.taps import Tap


@dataclass(frozen=True)
class Classifier:
    """The one layer whose output is the logits."""

    name: str = ""
    """Empty where there is no such layer."""
    width: int = 0
    """Numbers of an embedding; 0 where there is none."""
    refusal: str = ""
    """Why there is no embedding; empty where there is one."""

    def weight(self, model: nn.Module) -> Tensor | None:
        """A copy of its weight [K, D] on the CPU; None where there is no such layer."""
        if not self.name:
            return None
        layer: Any = model.get_submodule(self.name)
        return layer.weight.detach().flatten(1).cpu().clone()

    def tap(self) -> Tap:
        """A tap on the embedding; no copy, for a linear layer does not write into what it reads."""
        return Tap(self.name, copies=False)


def find_classifier(model: TimmModel, features: Features) -> Classifier:
    """The linear layer, or 1x1 convolution of one cell, that gives a model's logits; called in evaluation mode.

    Its output must be the logits themselves, in the same memory, so that it cannot be one of several heads that are averaged,
    or be scaled afterwards. A model without a classifier has none, and its embedding is what its head gives.
    """
    if model.num_classes < 1:
        return _of_head_output(model.forward_head(features))
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((module, args[0], output))

    layers: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    handles = [module.register_forward_hook(note) for module in layers]
    try:
        logits = model.forward_head(features)
    finally:
        for handle in handles:
            handle.remove()
    last = [each for each in seen if each[2].numel() == logits.numel() and each[2].data_ptr() == logits.data_ptr()]
    if len(last) != 1 or sum(module is last[0][0] for module, _, _ in seen) > 1:
        return Classifier(refusal="no single linear layer gives its logits")
    module, read, gave = last[0]
    width = read.numel() // len(read)
    again = module(read.detach())
    if width != read.shape[1] or not torch.equal(again.flatten(), logits.flatten()) or gave.flatten(1).shape != logits.shape:
        return Classifier(refusal=f"its last linear layer {layers[module]} reads more than one vector of an image")
    return Classifier(layers[module], width)


def _of_head_output(output: object) -> Classifier:
    """The width of what a head without a classifier gives, where that is one vector of each image."""
    if isinstance(output, Tensor) and output.ndim > 1 and output.numel() == output.shape[0] * output.shape[1]:
        return Classifier(width=output.shape[1])
    shape = list(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
    return Classifier(refusal=f"its head, which has no classifier, gives {shape} of an image, not one vector")
