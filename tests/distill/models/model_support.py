"""What several tests of the model room need."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import distill.models  # noqa: F401  (registers the CIFAR nets)
from distill.models.anatomy import examine
from distill.models.backbone import Backbone
from distill.protocols import InputSpec, Needs, Regions

PYRAMID = Regions(scales=(1, 2, 4))
SMALL_PYRAMID = Regions(scales=(1, 2))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def spec(size: int) -> InputSpec:
    return InputSpec(size, size, MEAN, STD, "bicubic", 0.9)


def normalised(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with noise on BatchNorm statistics, LayerScale and zero-initialised tensors, which else hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.mul_((0.3 * noise).exp())
            elif name.endswith("running_mean") or tensor.ndim == 1 or not tensor.any():
                tensor.add_(0.1 * noise)
    return model


def backbone(name: str, size: int, needs: Needs, num_classes: int = 10, seed: int = 0, **kwargs: object) -> Backbone:
    torch.manual_seed(seed)
    model = stirred(timm.create_model(name, num_classes=num_classes, **kwargs))
    return Backbone(model, examine(model, spec(size), name), needs)
