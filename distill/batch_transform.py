"""The way from a loader's bytes to what the models see: pixels in [0, 1], timm's Mixup, CutMix and RandomErasing.

One view for both models: each backbone normalises for itself afterwards, so teacher and student see the same mixed pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distill.protocols import Batch

ErasingMode = Literal["const", "rand", "pixel"]
"""What fills an erased box (timm's names)."""


def to_pixels(images: Tensor, channels_last: bool = True) -> Tensor:
    """Pixels float32 [B, 3, H, W] in [0, 1] from images uint8 [B, H, W, 3]. `channels_last` keeps the order in which the bytes
    come; without it they are moved into planes."""
    pixels = images.permute(0, 3, 1, 2).float().div_(255)
    return pixels if channels_last else pixels.contiguous()


def check_pairs(micro_batch: int) -> None:
    """Raises ValueError for a micro-batch that Mixup and CutMix cannot pair."""
    if micro_batch % 2:
        raise ValueError(f"images are mixed in pairs, and a micro-batch of {micro_batch} is odd; make it even")


class BatchTransform:
    """What the device does to a micro-batch before the models see it: to pixels, Mixup or CutMix, random erasing.

    A `Batch` becomes images float32 [B, 3, H, W] in [0, 1] and labels: int64 [B], or float [B, K] where mixing is on.
    Mixing pairs image i with image B-1-i of the same process's micro-batch (timm's `batch` mode), so B must be even:
    ValueError otherwise. Erasing fills boxes with noise of `mean` and `std`, the student's: as timm, which erases after
    normalisation. A view that is to be plain keeps its pixels.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        channels_last: bool,
        mixup: float,
        cutmix: float,
        mix_probability: float,
        cutmix_share: float,
        erasing: float,
        erasing_mode: ErasingMode,
        mix_off_epoch: int = 0,
    ) -> None:
        # not above: the recipe takes `ErasingMode` from here, and commands that need no model would wait a second for timm
        from timm.data import Mixup
        from timm.data.random_erasing import RandomErasing

        self.channels_last = channels_last
        self.mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        # label smoothing stays with the cross-entropy: smoothing mixed labels or mixing smoothed ones is the same
        self.mixup = (
            Mixup(mixup, cutmix, prob=mix_probability, switch_prob=cutmix_share, label_smoothing=0.0, num_classes=num_classes)
            if mixup or cutmix
            else None
        )
        self.mix_off_epoch = mix_off_epoch
        self.erasing = RandomErasing(erasing, mode=erasing_mode, device=device) if erasing else None

    def __call__(self, batch: Batch, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """The batch as the models see it in this epoch."""
        images, labels = to_pixels(batch.images, self.channels_last), batch.labels
        if self.mixup is not None:
            # off, timm's Mixup still gives soft labels, so the losses stay what they are
            self.mixup.mixup_enabled = not self.mix_off_epoch or epoch < self.mix_off_epoch
            check_pairs(len(images))
            images, labels = self.mixup(images, labels)
        if self.erasing is not None:
            erased = self.erasing((images - self.mean) / self.std) * self.std + self.mean
            images = erased if batch.plain is None else torch.where(batch.plain.view(-1, 1, 1, 1), images, erased)
        return images, labels
