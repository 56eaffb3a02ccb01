"""Evaluation: exact counts over a whole split, for any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from distill.batch_transform import to_pixels
from distill.errors import Interrupted
from distill.metrics import classification_metrics, classification_sums
from distill.protocols import Batch, Loader, ModelOutput


def evaluate(
    classifier: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    pulse: Callable[[], bool] = lambda: False,
    observe: Callable[[Batch, ModelOutput], None] | None = None,
) -> dict[str, float]:
    """top1, top5 (percent), loss, images and images_per_second of `classifier` over the whole split, exact for any number
    of processes: each counts its own share, the sums are added once. The buffers of rank 0 count. Images that cannot be
    decoded are left out, and `images` says so.

    `pulse` is called once per batch on every process; when it returns True everywhere, Interrupted is raised. `observe` sees
    each batch of this process with the classifier's output, without gradient and under the same autocast.
    """
    broadcast_buffers(classifier, accelerator)
    classifier.eval()
    begin = time.perf_counter()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    batches = loader.epoch(0)
    # `pulse` is a collective and the processes' shares differ by one image: all go round as often as the longest
    rounds = accelerator.gather(torch.tensor([loader.batches_per_epoch], device=accelerator.device)).max().item()
    for _ in range(int(rounds)):
        batch = next(batches, None)
        if batch is not None and len(batch.labels):
            with torch.no_grad(), accelerator.autocast():
                output = classifier(to_pixels(batch.images))
                if observe is not None:
                    observe(batch, output)
            sums += classification_sums(output.logits, batch.labels)
        if pulse():
            raise Interrupted("stopped in evaluation; the same command with --resume makes it again and goes on")
    bad = len(known_bad_samples(loader))
    metrics = classification_metrics(accelerator.reduce(sums, reduction="sum"))
    if not loader.num_samples - bad <= metrics["images"] <= loader.num_samples:
        raise RuntimeError(f"evaluated {metrics['images']} images, the split holds {loader.num_samples}, {bad} of them bad")
    return {**metrics, "images_per_second": loader.num_samples / (time.perf_counter() - begin)}


def known_bad_samples(loader: Loader) -> list[int]:
    """The samples of the loader's split that any process knows to be bad, sorted; a collective."""
    return sorted(set(gather_object(loader.bad_samples)))


def broadcast_buffers(module: nn.Module, accelerator: Accelerator) -> None:
    """Rank 0's buffers (BatchNorm statistics) on every process: local statistics differ between processes."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
