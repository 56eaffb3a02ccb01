"""Seeds: every random stream of a run is derived from the recipe's one seed by `derive_seed`."""

from __future__ import annotations

import hashlib
import random

import numpy as np


def derive_seed(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one purpose: a stable hash of its arguments, the same on every machine and Python version."""
    text = ":".join([purpose, str(int(seed)), *(str(int(counter)) for counter in counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds torch (every device), numpy and Python. Called before each step with a seed derived from (run, step, rank), so
    that no generator's state has to be saved and a resumed run draws what the interrupted one would have drawn."""
    import torch  # here: what prepares data derives seeds too, and starts in a fifth of the time without torch

    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (timm's Mixup draws from numpy's global generator)
    random.seed(seed)
