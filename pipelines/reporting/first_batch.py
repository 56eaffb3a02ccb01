"""The first training batch of a run, kept as its models see it: RUN/first_batch.npz."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.files import written_aside
from distill.protocols import Batch
from distill.run import Transform
from pipelines.reporting.dump import Array

FILE = "first_batch.npz"
MOST, SIDE = 24, 160
"""Images that are kept, and the longest side that they are kept with: 2 MB at most."""


class FirstBatch(NamedTuple):
    """Views of training images: what cropping, mixing and erasing left of them."""

    images: Array
    """uint8 [N, H, W, 3]."""
    labels: list[str]
    """The class's name; for mixed images both, with their shares."""

    @classmethod
    def read(cls, folder: Path) -> FirstBatch | None:
        """The batch that a run's folder holds; None where there is none, or no whole one."""
        try:
            with np.load(folder / FILE, allow_pickle=False) as file:
                return cls(file["images"], json.loads(str(file["labels"])))
        except (OSError, ValueError, KeyError, BadZipFile):
            return None


def keeping_first(transform: Transform, folder: Path, class_names: Sequence[str]) -> Transform:
    """`transform`, which writes what it makes of its first batch into the folder of a run, unless a batch lies there."""
    waiting = not (folder / FILE).is_file()

    def transformed(batch: Batch, epoch: int) -> tuple[Tensor, Tensor]:
        nonlocal waiting
        images, labels = transform(batch, epoch)
        if waiting:
            waiting = False
            _write(folder / FILE, images[:MOST].detach().cpu(), labels[:MOST].detach().cpu(), class_names)
        return images, labels

    return transformed


def _write(path: Path, images: Tensor, labels: Tensor, class_names: Sequence[str]) -> None:
    if (longest := max(images.shape[2:])) > SIDE:
        images = F.interpolate(images, scale_factor=SIDE / longest, mode="bilinear", antialias=True)
    # erasing with noise leaves [0, 1]
    pixels = images.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, images=pixels, labels=np.array(json.dumps(_named(labels, class_names))))


def _named(labels: Tensor, class_names: Sequence[str]) -> list[str]:
    if labels.dim() == 1:
        return [class_names[label] for label in labels.tolist()]
    shares, classes = labels.topk(min(2, labels.shape[1]))
    pairs = zip(classes.tolist(), shares.tolist(), strict=True)
    return [
        ", ".join(f"{class_names[k]} {share:.0%}" for k, share in zip(ks, each, strict=True) if share > 0.005)
        for ks, each in pairs
    ]
