"""What a model gives and costs, without weights: for people who choose a pair, and for the table of all architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from distill.models.anatomy import evaluating
from distill.models.backbone import Backbone
from distill.models.build import ProbedModel, create_model, probe
from distill.models.region_logits.layout import Layout, TimmModel
from distill.models.region_logits.probe import perturbed
from distill.protocols import InputSpec, ModelFacts, Needs


@dataclass(frozen=True)
class Description:
    """One model as a teacher or student."""

    name: str
    kind: str
    """Its class in timm."""
    parameters: int
    flops: int
    """Floating-point operations of one forward pass of one image; a multiplication and an addition are two. 0: not counted."""
    input_spec: InputSpec
    classes_of_weights: int
    """Classes of the default weights of this name; 0 for weights without a classifier."""
    features: str
    """Form of what the head reads, with the number of prefix tokens."""
    grid: tuple[int, int]
    facts: ModelFacts
    """What losses are told of it."""
    mechanism: str
    """The way to region logits; "refused" where there is none."""
    whole_image_difference: float | None
    head_batchnorms: int
    refusal: str
    """Why there are no region logits; empty where there are."""


@contextmanager
def probed_with_noise(model: TimmModel, *, name: str, **options: Any) -> Iterator[ProbedModel]:
    """The model as `probe` finds it. Inside the block BatchNorm statistics, LayerScale and zero-initialised layers carry noise,
    so that the fresh weights of an outline hide nothing. The options are those of `probe`."""
    with perturbed(list(model.modules()), torch.Generator().manual_seed(0)):
        yield probe(model, name=name, **options)


def describe(probed: ProbedModel, needs: Needs, *, count_flops: bool = True) -> Description:
    """The description of a model with any weights, or of its outline; `needs` asks for region logits."""
    model, anatomy = probed.model, probed.anatomy
    refusal = ""
    try:
        backbone = probed.backbone(needs)
    except ValueError as error:
        refusal = str(error)
        backbone = probed.backbone(replace(needs, region_logits=()))
    return Description(
        name=anatomy.name,
        kind=type(model).__name__,
        parameters=count_parameters(model),
        flops=_flops(backbone) if count_flops else 0,
        input_spec=probed.input_spec,
        classes_of_weights=int(model.pretrained_cfg.get("num_classes", 0)),  # type: ignore[operator, union-attr]
        features=_features(backbone.layout),
        grid=backbone.grid,
        facts=probed.facts,
        mechanism="refused" if refusal else backbone.mechanism,
        whole_image_difference=backbone.whole_image_difference,
        head_batchnorms=len(backbone.head_norms),
        refusal=refusal,
    )


def _flops(backbone: Backbone) -> int:
    """Floating-point operations of the plain model on one image of its own size."""
    spec = backbone.input_spec
    image = torch.zeros(1, 3, spec.height, spec.width)
    trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    # the counter looks for the gradient of all that asks for one, and CaiT's class token does so without a graph too
    for parameter in trained:
        parameter.requires_grad_(False)
    with evaluating(backbone.model):
        found = flops_of(lambda: backbone.model(image))
    for parameter in trained:
        parameter.requires_grad_(True)
    return found


def flops_of(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, as PyTorch counts them; a backward pass inside it counts."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def _features(layout: Layout) -> str:
    parts = [f"{part.form}+{part.prefix}" if part.prefix else part.form for part in layout.parts]
    return " ".join(parts)


Model = TypeVar("Model", bound=nn.Module)
LARGE = 2**18
"""Parameters with at least so many values share one tensor per shape: 1 MiB in float32. All others are timm's own, so norms,
biases, LayerScales and small heads are what the architecture makes them."""


def create_outline(name: str, **kwargs: Any) -> TimmModel:
    """The architecture as `create_model` makes it, its large parameters of one shape being one tensor of noise.

    What layers do to shapes, grids and regions is that of the plain model; 6.7 billion parameters take 0.5 GiB.
    `count_parameters` counts them. ValueError as in `create_model`.
    """
    return outlined(lambda: create_model(name, **kwargs))


def outlined(make: Callable[[], Model]) -> Model:
    """What `make` makes, with large parameters that share one tensor of noise per shape, as in `create_outline`."""
    with Uninitialised():
        model = make()
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


class Uninitialised(TorchFunctionMode):
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
