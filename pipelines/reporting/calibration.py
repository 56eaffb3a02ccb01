"""Numbers of confidence: reliability, calibration error, agreement of two models. Pure functions of arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipelines.reporting.dump import Array

BINS = 15


class Reliability(NamedTuple):
    """Confidence against truth in bins of equal width; arrays [BINS], NaN where a bin is empty."""

    counts: Array
    confidence: Array
    """The mean softmax of the named class."""
    accuracy: Array
    """The share of images named rightly."""
    error: float
    """The expected calibration error: the mean |accuracy - confidence| over images, in percent (Guo et al. 2017)."""


def reliability(confidence: Array, right: Array, bins: int = BINS) -> Reliability:
    """The reliability of confidences in [0, 1] with `right` bool, both [N]; bin i is (i / bins, (i + 1) / bins]."""
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = np.where(counts > 0, counts, np.nan)
    mean = np.bincount(place, confidence, minlength=bins) / filled
    accuracy = np.bincount(place, right, minlength=bins) / filled
    error = 100 * np.nansum(counts * np.abs(accuracy - mean)) / len(confidence)
    return Reliability(counts, mean, accuracy, float(error))


def log_softmax(logits: Array) -> Array:
    """float64 [N, K], in log space."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def divergence(teacher_logits: Array, student_logits: Array) -> float:
    """The mean KL divergence of the student from the teacher at temperature 1, in nats; logits [N, K]."""
    theirs, ours = log_softmax(teacher_logits), log_softmax(student_logits)
    return float((np.exp(theirs) * (theirs - ours)).sum(1).mean())
