"""A frozen teacher in fewer bits: weights in bfloat16, or its Linear layers in int8 or float8 by torchao."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor, nn

EIGHT_BITS = {"int8": 8, "fp8": 16}
"""Precisions of torchao's, and what both sizes of a layer are multiples of where a GPU's products take it."""
_CAST = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


class Quantized(NamedTuple):
    """What became of a model's layers with weights."""

    layers: int
    of_layers: int
    """Linear and convolutional ones."""
    share: float
    """Of all parameters of the model."""


def bfloat16_weights(model: nn.Module) -> None:
    """Keeps the weights of Linear and convolutional layers in bfloat16, in place; to be run under bfloat16 autocast.

    The outputs are those of autocast over float32 weights, bit for bit, which would cast them anew in every call: it remembers
    only weights that take a gradient. Normalisation stays float32, and so do layers that compute their weights (weight
    standardisation).
    """
    for module in model.modules():
        if type(module).forward in _CAST:
            module.to(torch.bfloat16)


def check_quantisable(name: str, model: nn.Module, precision: str, device: torch.device) -> None:
    """Raises ValueError with the reason where this model cannot be had in this precision on this device."""
    if precision == "bf16" and not bfloat16_usable(device):
        raise ValueError(f"needs a device that computes in bfloat16 and {device} does not; leave it at auto")
    if precision not in EIGHT_BITS:
        return
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise ValueError(f"needs a GPU of compute capability 8.9 or more, this is {device}; take int8 or bf16")
    if not _linear_layers(model, precision):
        step = EIGHT_BITS[precision]
        raise ValueError(f"would quantise nothing: {name} has no Linear layer of sizes that are multiples of {step}; take bf16")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("needs torchao, which is not installed; pip install 'distill[quantize]', or take bf16")


def bfloat16_usable(device: torch.device) -> bool:
    """Whether the device has bfloat16 of its own; old GPUs emulate it."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def quantize(model: nn.Module, precision: str) -> Quantized:
    """Quantises the Linear layers, in place: weights per output channel (int8) or tensor (float8), inputs at each call.

    Convolutions stay as they are: torchao has no int8 ones, and its float8 ones need one more library. Raises ValueError where
    nothing is quantised.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        quantize_,
    )

    kind = Int8DynamicActivationInt8WeightConfig if precision == "int8" else Float8DynamicActivationFloat8WeightConfig
    chosen = _linear_layers(model, precision)
    parameters = sum(p.numel() for p in model.parameters())
    # set_inductor_config would change PyTorch's own settings, of the student's float32 products among others
    quantize_(model, kind(set_inductor_config=False), filter_fn=lambda module, name: name in chosen)
    for layer in chosen.values():
        layer.register_forward_pre_hook(_in_dtype_of_weight)
    weights = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]
    return Quantized(len(chosen), len(weights), sum(layer.weight.numel() for layer in chosen.values()) / parameters)


def _linear_layers(model: nn.Module, precision: str) -> dict[str, nn.Linear]:
    """The layers that are quantised: of sizes that the products of few bits take on GPUs. torchao leaves others alone (float8),
    or sends them through the host in every call (int8)."""
    step = EIGHT_BITS[precision]
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.in_features % step == 0 and module.out_features % step == 0
    }


def _in_dtype_of_weight(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Autocast does not see into torchao's tensors: a float32 input would have a float32 output."""
    return tuple(x.to(layer.weight.dtype) for x in inputs)
