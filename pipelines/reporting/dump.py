"""A dump: what one model says of one split, as a .npz file that NumPy reads alone. docs/report.md lists its arrays."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FORMAT = 1

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Dump:
    """The arrays of one dump by name, and its facts."""

    facts: dict[str, Any]
    arrays: dict[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @classmethod
    def load(cls, path: Path) -> Dump:
        """The dump in a file. Raises ValueError for a file that is none, or one of another version."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            facts = json.loads(str(arrays.pop("facts")))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: no dump ({error}); write it with `pipelines/evaluate.py --dump`") from error
        if facts.get("format") != FORMAT:
            raise ValueError(f"{path}: format {facts.get('format')}, this version reads {FORMAT}; write the dump again")
        return cls(facts, arrays)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """int64 [N]: the class that the model names first for each image."""
        return self["top_classes"][:, 0].astype(np.int64)

    @property
    def confidence(self) -> NDArray[np.float64]:
        """float64 [N]: the softmax of that class over all classes."""
        return np.exp(self["top_logits"][:, 0].astype(np.float64) - self["log_sum_exp"])

    @property
    def class_names(self) -> list[str]:
        """The names of all classes of the split, also of those without an image."""
        return list(self.facts["class_names"])

    @property
    def sampled_labels(self) -> Array:
        """The labels of the sample's images."""
        labels: Array = self["labels"][self.rows(self["sampled_ids"])]
        return labels

    def rows(self, samples: ArrayLike) -> Any:
        """The rows of these samples, all of which the dump holds."""
        return np.searchsorted(self["sample_ids"], samples)

    def has_split_of(self, other: Dump) -> bool:
        """Whether both dumps are of one split, so that they can be compared image by image."""
        return bool(self.facts["split_digest"] == other.facts["split_digest"])


def joined(first: Dump, second: Dump) -> tuple[Array, Array]:
    """Rows of the first and of the second dump that are the same images. Raises ValueError for dumps of two splits."""
    if not first.has_split_of(second):
        raise ValueError(f"dumps of two splits: {first.facts['split']} and {second.facts['split']}; dump one of them again")
    return _common(first["sample_ids"], second["sample_ids"])


def joined_samples(first: Dump, second: Dump) -> tuple[Array, Array]:
    """Rows of both samples that are the same images."""
    return _common(first["sampled_ids"], second["sampled_ids"])


def _common(first: Array, second: Array) -> tuple[Array, Array]:
    _, mine, theirs = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    return mine, theirs
