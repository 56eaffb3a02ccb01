"""Exact classification counts and honest throughput."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F


def classification_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [4]: images, top-1 hits, top-5 hits, summed cross-entropy, of logits [B, K] and labels [B].

    Sums, not means: adding them over batches and processes is exact for any split of the data. B may be 0. With fewer than
    five classes, top-5 counts the top K.
    """
    scores = logits.float()
    best = scores.topk(min(5, scores.shape[-1]), dim=-1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(scores, labels, reduction="sum")
    # filled on the device: a number copied there would make the host wait for it
    count = torch.full((), len(labels), dtype=torch.float64, device=logits.device)
    return torch.stack([count, hits[:, 0].sum().double(), hits.any(dim=-1).sum().double(), loss.double()])


def classification_metrics(sums: Tensor) -> dict[str, float]:
    """`images`, `top1` and `top5` in percent, `loss` as a mean, from summed `classification_sums`."""
    count, top1, top5, loss = sums.tolist()
    if count == 0:
        raise ValueError("nothing was evaluated: the validation split holds 0 images")
    return {"images": int(count), "top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}


class Throughput:
    """Images per second of training: pauses (evaluation, checkpoints) and the first step after a start are left out."""

    def __init__(self, images: int = 0, seconds: float = 0.0) -> None:
        self.images, self.seconds = images, seconds
        self._last: float | None = None

    def step(self, images: int) -> None:
        """One optimiser step over `images` images (of all processes) is done."""
        now = time.perf_counter()
        if self._last is not None:
            self.images += images
            self.seconds += now - self._last
        self._last = now

    def pause(self) -> None:
        """What follows is not training; the next step starts the clock anew and is not counted."""
        self._last = None

    @property
    def images_per_second(self) -> float:
        """0.0 until the second step."""
        return self.images / self.seconds if self.seconds else 0.0
