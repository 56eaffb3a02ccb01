"""Reads the golden vectors of tests/golden: inputs, values and gradients of the authors' own code (SDD, KD family) and of an
independent evaluation of the paper's equations (MSDCRD)."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "golden"
RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest error allowed, relative to the largest entry of what is expected."""


@lru_cache
def index(family: str) -> dict:
    """The list of cases of `sdd` or `msdcrd`."""
    return json.loads((FOLDER / family / "index.json").read_text())


def cases(family: str, key: str) -> list[dict]:
    """The cases under one key of the index."""
    return index(family)[key]


def vectors(family: str, case: dict) -> dict[str, Tensor]:
    """The tensors of a case."""
    return load_file(FOLDER / family / case["file"])


def stored(family: str, case: dict) -> set[str]:
    """The names of a case's tensors."""
    with safe_open(FOLDER / family / case["file"], "pt") as file:
        return set(file.keys())


def assert_matches(actual: Tensor, expected: Tensor, dtype: torch.dtype, noise: float = 0.0) -> None:
    """Every entry within 1e-9 (float64) or 1e-5 (float32) of the largest expected entry.

    `noise` is an absolute error of the expected numbers themselves: some stored zeros are rounding errors of the authors' code.
    """
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    assert error <= RELATIVE[dtype] * expected.double().abs().max() + noise, f"off by {error} of {expected.abs().max()}"
