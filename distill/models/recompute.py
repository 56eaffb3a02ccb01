"""Activation checkpointing of a student: less memory for one more forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.backbone import Backbone


def set_activation_checkpointing(backbone: Backbone) -> tuple[int, int]:
    """Makes the student forget its activations in the forward pass and compute them again in the backward pass (timm's
    `set_grad_checkpointing`). Returns the bytes that one image keeps for the backward pass, before and after.

    Enter `unchanged_statistics` around every backward pass. ValueError where the architecture cannot do it, or where it saves
    nothing: not every architecture of timm heeds the request on every way through it.
    """
    before = activation_bytes(backbone)
    try:
        backbone.model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:  # timm's architectures refuse in three ways
        raise ValueError(f"student.checkpoint_activations: {backbone.name} cannot do it in timm; leave it out") from error
    after = activation_bytes(backbone)
    if after >= before:
        asked = ", ".join(map(str, sorted(backbone.needs.stages))) or "none"
        raise ValueError(
            f"student.checkpoint_activations: saves nothing for {backbone.name} here (stages asked for: {asked}); timm does"
            " not heed it on the way that these take; ask for fewer stages, or leave it out"
        )
    return before, after


def activation_bytes(backbone: Backbone) -> int:
    """Bytes that one training image of the student's size keeps for the backward pass, weights left out.

    Measured with two images (BatchNorm wants more than one value per channel); statistics and generators stay as they were.
    """
    spec, device = backbone.input_spec, backbone.mean.device
    # the storage's own handle: a fake tensor has no address
    own = {t.untyped_storage()._cdata for t in (*backbone.parameters(), *backbone.buffers())}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)  # a freed handle would be given to another tensor
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    # a fake tensor draws no numbers, and its mode takes the state of a real generator for an error
    devices = [device] if device.type == "cuda" and not isinstance(backbone.mean, FakeTensor) else []
    with unchanged_statistics(backbone), torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        backbone(torch.zeros(2, 3, spec.height, spec.width, device=device))
    return sum(kept.values()) // 2


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Forward passes inside leave the running statistics of every BatchNorm as they are.

    What a backward pass computes again was counted when it was computed first: without this, checkpointing moves the
    statistics twice per step.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before: list[tuple[_BatchNorm, Any, Any]] = [(m, m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
