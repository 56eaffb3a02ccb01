"""Losses on the labels alone: cross-entropy over all classes together, or of each class by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.inputs import soft_labels
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelOutput, Needs, Target


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, threshold: float | None = None
) -> Tensor:
    """Cross-entropy of each class's sigmoid with its target, the mean over the classes: [B, K], labels [B] or [B, K] -> [B].

    A target is the label's (1 - s) + s / K, s the smoothing; above `threshold` it counts as 1, and as 0 elsewhere. Its
    gradient is 1/K of that of a sum: harmless to LAMB and Adam, not to SGD. Source: Wightman et al. 2021 (ResNet strikes
    back); timm's BinaryCrossEntropy, which leaves the smoothing of soft labels to Mixup: the same numbers.
    """
    classes = logits.shape[-1]
    if not labels.is_floating_point():  # not one_hot, which waits for the device
        labels = torch.zeros_like(logits).scatter(-1, labels.unsqueeze(-1), 1.0)
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / classes
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


class CrossEntropy(Criterion):
    """Cross-entropy with the labels, hard or soft; needs no teacher.

    Args:
        label_smoothing: share of the target spread evenly over all classes, from 0 to 1.
        binary: of each class by itself, as `binary_cross_entropy` has it (timm's --bce-loss), and not of all together.
        threshold: with `binary`: a target above it counts as 1, all others as 0; null leaves them as they are. ResNet
            strikes back takes 0.2, DeiT III 0.
        sum_classes: with `binary`: the sum over the classes (timm's --bce-sum), not the mean.
    """

    student_needs = Needs(logits=True)
    teacher_needs = None

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        binary: bool = False,
        threshold: float | None = None,
        sum_classes: bool = False,
    ) -> None:
        super().__init__()
        for key, value in (("label_smoothing", label_smoothing), ("threshold", 0.0 if threshold is None else threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{key} {value} must lie in 0..1")
        if not binary and (threshold is not None or sum_classes):
            raise ValueError("threshold and sum_classes belong to binary: true; set it, or drop them")
        self.label_smoothing, self.binary, self.threshold, self.sum_classes = label_smoothing, binary, threshold, sum_classes

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B] or float [B, K]."""
        logits, labels = full_precision(student.logits), target.labels
        labels = labels.to(logits.dtype) if soft_labels(labels, logits) else labels.long()
        with no_autocast(logits):
            if self.binary:
                rows = binary_cross_entropy(logits, labels, self.label_smoothing, self.threshold)
                return rows.mean() * (logits.shape[-1] if self.sum_classes else 1), {}
            # Cross-entropy passes over label -100 by default, which would hide a wrong label on a GPU; no label is passed over.
            none = torch.iinfo(torch.int64).min
            return F.cross_entropy(logits, labels, ignore_index=none, label_smoothing=self.label_smoothing), {}
