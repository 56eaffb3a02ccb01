"""Numbers of who is right about which image: flips, classes, confused pairs. Pure functions of predictions."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pipelines.reporting.dump import Array, Dump, joined


class Flips(NamedTuple):
    """Rows of the images that one of two models is right about and the other is not."""

    gained: Array
    """Right now, wrong in the other."""
    lost: Array
    """Wrong now, right in the other."""


def flips(labels: Array, mine: Array, other: Array) -> Flips:
    """The images that `mine` wins and loses against `other`; predictions and labels [N]."""
    now, before = mine == labels, other == labels
    return Flips(np.flatnonzero(now & ~before), np.flatnonzero(~now & before))


def flips_between(dump: Dump, other: Dump) -> tuple[Array, Array, Flips]:
    """Rows of both dumps that are the same images, and which of these the first wins and loses. ValueError as `joined`."""
    mine, theirs = joined(dump, other)
    return mine, theirs, flips(dump["labels"][mine], dump.predicted[mine], other.predicted[theirs])


def difference(found: Flips, images: int) -> tuple[float, float]:
    """The difference in top-1 (points) and half the width of its 95 % interval over draws of as many images.

    The interval is that of paired proportions. It knows nothing of another seed's training.
    """
    gained, lost = len(found.gained), len(found.lost)
    mean = (gained - lost) / images
    variance = max((gained + lost) / images - mean**2, 0.0) / images
    return 100 * mean, 100 * 1.96 * math.sqrt(variance)


def class_accuracies(labels: Array, predicted: Array, classes: int) -> Array:
    """Percent right of each class's images, float64 [K]; NaN for a class without an image."""
    counts = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)
    return np.where(counts > 0, 100 * right / np.maximum(counts, 1), np.nan)


class Confusion(NamedTuple):
    """A pair of classes that a model confuses in one direction."""

    label: int
    predicted: int
    images: int
    share: float
    """The part of the label's images that is predicted so."""
    example: int
    """A row that shows it: the first."""


def confused_pairs(labels: Array, predicted: Array, classes: int, most: int) -> list[Confusion]:
    """The `most` frequent pairs of label and wrong prediction, the most frequent first."""
    wrong = np.flatnonzero(labels != predicted)
    pairs, first, counts = np.unique(labels[wrong] * classes + predicted[wrong], return_index=True, return_counts=True)
    totals = np.bincount(labels, minlength=classes)
    found = []
    for i in np.argsort(-counts, kind="stable")[:most]:
        label, named = divmod(int(pairs[i]), classes)
        found.append(Confusion(label, named, int(counts[i]), counts[i] / totals[label], int(wrong[first[i]])))
    return found
