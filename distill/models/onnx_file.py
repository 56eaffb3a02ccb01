"""A plain timm model as an ONNX file that is known to give the model's logits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.onnx import OnnxExporterError

from distill.files import written_aside

TOLERANCE = 1e-4
"""Largest difference between both runtimes' logits, relative to the largest logit: float32 sums in another order differ by
1e-6 to 1e-5."""


class Agreement(NamedTuple):
    """A comparison of the ONNX file with the PyTorch model, on the images that it was checked on."""

    largest_difference: float
    """Absolute, over all images and classes."""
    largest_logit: float
    same_top1: int
    """Images for which both name the same class."""
    images: int


def export_onnx(model: nn.Module, images: Tensor, file: Path) -> Agreement:
    """Writes `model`, in evaluation mode, to `file` and compares both on `images`, in batches of one and of all others.

    images: normalised float32 [B, 3, H, W], B at least 2. The file's input `images` takes any batch, its output
    is `logits` [batch, K]. ValueError, and no file, where the model cannot be exported or the logits differ by more than
    `TOLERANCE`.
    """
    model.eval()
    with written_aside(file) as aside:
        _write(model, images[:2], aside)
        found = _compare(model, images, aside)
        limit = TOLERANCE * max(found.largest_logit, 1.0)
        if not found.largest_difference <= limit:  # so written, NaN is refused
            raise ValueError(
                f"{file}: onnxruntime's logits differ from PyTorch's by {found.largest_difference:.1e},"
                f" more than {limit:.1e}; the file was not kept"
            )
    return found


def _write(model: nn.Module, images: Tensor, file: Path) -> None:
    try:
        program = torch.onnx.export(
            model,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    except OnnxExporterError as error:
        raise ValueError(f"torch.onnx cannot export this {type(model).__name__}: {str(error).splitlines()[0]}") from error
    assert program is not None  # it is None for the old exporter only
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces with the paths of this machine
    program.save(file)


def _compare(model: nn.Module, images: Tensor, file: Path) -> Agreement:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    parts = (images[:1], images[1:])
    with torch.no_grad():
        wanted = np.concatenate([model(part).numpy() for part in parts])
    given = np.concatenate([session.run(None, {"images": part.numpy()})[0] for part in parts])
    return Agreement(
        largest_difference=float(np.abs(given - wanted).max()),
        largest_logit=float(np.abs(wanted).max()),
        same_top1=int((given.argmax(1) == wanted.argmax(1)).sum()),
        images=len(images),
    )
