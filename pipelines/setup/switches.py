"""The switches of a GPU's arithmetic: the recipe sets them, whatever the environment left, and the manifest reads them back."""

from __future__ import annotations

import os
from typing import Any

import torch

from distill.config import RecipeError
from distill.recipe import Train

VARIABLES = ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
"""Variables that PyTorch, NVIDIA's libraries and cuBLAS read. The first is only where PyTorch's own switch begins."""


def set_switches(
    device: torch.device,
    tf32: str = Train.tf32,
    cudnn_benchmark: bool = Train.cudnn_benchmark,
    deterministic: bool = Train.deterministic,
) -> None:
    """Sets this process's switches, by default as a recipe that says nothing; comes before the first product on the device.

    RecipeError where NVIDIA's libraries are told by the environment to use no TF32, over every switch, and the recipe does.
    """
    if device.type == "cuda" and tf32 != "none" and os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        raise RecipeError(
            f"train.tf32: {tf32!r}, and NVIDIA_TF32_OVERRIDE=0 in the environment forbids TF32; unset it, or say none"
        )
    torch.backends.cuda.matmul.allow_tf32 = tf32 == "all"
    torch.backends.cudnn.allow_tf32 = tf32 != "none"
    # the fastest algorithm by the clock may be another one in the next run, and it need not be deterministic
    torch.backends.cudnn.benchmark = cudnn_benchmark and not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        # cuBLAS reads it when it is first used; without it products on several streams may differ from run to run
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def switches() -> dict[str, Any]:
    """The switches as they stand in this process, and the variables that touch them, for the manifest."""
    return {
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
