"""What a timm model is: found by running it once, right after it was made. Everything else is made from that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.classifier import Classifier, find_classifier
from distill.models.preactivations import Preactivation, Trace, find_preactivation
from distill.models.region_logits.layout import Features, Layout, TimmModel, find_layout
from distill.protocols import InputSpec, MapShape, ModelFacts


@dataclass(frozen=True)
class Anatomy:
    """The findings of one probe of a model in evaluation mode; every backbone over the model or a copy of it shares them."""

    name: str
    input_spec: InputSpec
    layout: Layout
    facts: ModelFacts
    stage_indices: tuple[int, ...]
    """Indices for `forward_intermediates` of the curated stages before the feature map, first to last."""
    features: Features
    """What the head reads, for two images of noise."""
    images: Tensor
    stand_in: Tensor | None
    """The feature map, where it is none of the features."""
    generator: torch.Generator
    classifier: Classifier
    preactivations: tuple[Preactivation, ...]
    """One for each curated stage, first to last."""
    found: dict[str, Any] = field(default_factory=dict)
    """What is looked for only when somebody asks: `find_mechanism` and `head_bias_refusal` keep their findings here."""

    def __deepcopy__(self, memo: object) -> Anatomy:
        """The same object: a copy of a model has the same anatomy."""
        return self


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards every module's mode and the random number states are as before."""
    modes = {module: module.training for module in model.modules()}
    # PyTorch would save the states of all visible GPUs, and warn where there are several
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def examine(model: TimmModel, spec: InputSpec, name: str = "") -> Anatomy:
    """The anatomy of a timm model at this input size, called `name` in errors.

    ValueError, with the reason, for a model whose features have no grid.
    """
    name = name or type(model).__name__
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    images = torch.randn(2, 3, spec.height, spec.width, generator=generator).to(parameter.device, parameter.dtype)
    trace = Trace(model)
    with evaluating(model):
        with trace.recording():
            features, maps = model.forward_intermediates(images, stop_early=False, output_fmt="NCHW")
        try:
            layout = find_layout(model, features, maps)
        except ValueError as error:
            raise ValueError(f"{name} cannot be served: {error}") from error
        classifier = find_classifier(model, features)
    indices = curate(maps, layout, (spec.height, spec.width))
    stand_in = None if layout.stand_in is None else maps[layout.stand_in]
    stages = [*(maps[i] for i in indices), layout.map_of(features) if stand_in is None else stand_in]
    preactivations = tuple(find_preactivation(trace, each) for each in stages)
    facts = ModelFacts(
        num_classes=int(model.num_classes),
        stages=tuple(MapShape(*each.shape[1:]) for each in stages),
        blocks=tuple(MapShape(*each.shape[1:]) for each in maps),
        embedding=classifier.width,
        preactivation_norms=tuple(each.norm for each in preactivations),
        classifier=classifier.weight(model),
    )
    return Anatomy(name, spec, layout, facts, indices, features, images, stand_in, generator, classifier, preactivations)


def curate(maps: Sequence[Tensor], layout: Layout, image: tuple[int, int]) -> tuple[int, ...]:
    """Indices of the stages before the feature map: the last map of each resolution coarser than the stem's.

    Maps finer than 1/4 of the image are a stem's where the net goes on to 1/16 or coarser; a CIFAR net starts its stages at
    full resolution. Maps as coarse as the feature map are left to the feature map.
    """
    last = {m.shape[2]: i for i, m in enumerate(maps)}
    deep = image[0] / layout.height >= 16
    kept = [i for height, i in last.items() if height > layout.height and not (deep and image[0] / height < 4)]
    return tuple(sorted(kept, key=lambda i: -maps[i].shape[2]))
