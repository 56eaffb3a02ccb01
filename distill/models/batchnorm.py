"""What BatchNorm does while a student trains on several processes."""

from __future__ import annotations

from typing import get_args

import torch
from timm.layers import convert_sync_batchnorm
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.backbone import Backbone
from distill.protocols import BatchNormMode

MODES = get_args(BatchNormMode)


def set_batchnorm(backbone: Backbone, mode: str) -> Backbone:
    """The same backbone with its BatchNorms `local` (each process its own batch), `sync` (all processes' batch) or `frozen`.

    Frozen: statistics and affine parameters stay as they are, also after `train()`. Synchronised ones need a GPU: ValueError
    without one, and for another mode's name. Call it before the optimiser and DDP are made.
    """
    if mode not in MODES:
        raise ValueError(f"batchnorm {mode!r}: not a mode; choose one of {', '.join(MODES)}")
    if mode == "sync":
        if not torch.cuda.is_available():
            raise ValueError("batchnorm 'sync': PyTorch synchronises BatchNorm on GPUs only; use 'local' or 'frozen' here")
        # timm's own conversion: PyTorch's would drop the activation inside timm's BatchNormAct layers
        backbone.model = convert_sync_batchnorm(backbone.model)
    if mode == "frozen":
        for module in backbone.model.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
    backbone.batchnorm_frozen = mode == "frozen"
    return backbone.train(backbone.training)
