"""The data set that scikit-learn embeds: 1,797 real scans of handwritten digits, 8 x 8 pixels, as 32 x 32 colour images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.data.order import permutation
from distill.seeds import derive_seed

CLASS_NAMES = tuple("0123456789")
SIDE = 32
VAL_SHARE = 5
"""Every fifth image of a class is held out."""


class Digits(NamedTuple):
    """One split."""

    images: NDArray[np.uint8]
    """[N, 32, 32, 3], the three channels equal."""
    labels: NDArray[np.int64]
    """[N], 0 to 9."""
    rows: NDArray[np.int64]
    """[N], the image's row in scikit-learn's data set."""


def load_digits_split(split: str) -> Digits:
    """The `train` (about 80 %) or `val` split: within each class a fixed random fifth is `val`. Raises ValueError otherwise."""
    from sklearn.datasets import load_digits

    if split not in ("train", "val"):
        raise ValueError(f"split {split!r}: the digits have train and val")
    data = load_digits()
    labels = np.asarray(data.target, np.int64)
    held_out = np.zeros(len(labels), bool)
    for label in range(len(CLASS_NAMES)):
        members = np.flatnonzero(labels == label)
        shuffled = members[permutation(derive_seed(0, "digits split", label), len(members))]
        held_out[shuffled[: len(members) // VAL_SHARE]] = True
    rows = np.flatnonzero(held_out == (split == "val"))
    images = np.stack([_enlarge(scan) for scan in data.images[rows]])
    return Digits(images, labels[rows], rows)


def _enlarge(scan: NDArray[np.float64]) -> NDArray[np.uint8]:
    """[8, 8] of ink counts 0 to 16 -> [32, 32, 3] of grey levels 0 to 255."""
    grey = Image.fromarray((scan * 255 / 16).round().astype(np.uint8))
    large = grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(large)[:, :, None], 3, axis=2)
