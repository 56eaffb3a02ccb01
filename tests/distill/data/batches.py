"""Batches that the processes of a run have together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill.data.batch_plan import TrainPlan
from distill.data.stream import Position


def global_batch(plans: Sequence[TrainPlan], accumulate: int, epoch: int, step: int) -> NDArray[np.int64]:
    """The samples of one step: the micro-batches of all ranks' `plans`, one after the other."""
    micros = (Position(epoch, step * accumulate + micro) for micro in range(accumulate))
    return np.concatenate([plan.samples(position) for position in micros for plan in plans])
