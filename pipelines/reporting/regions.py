"""Numbers of regions: their places in the picture, and the rule that they are compared by. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distill.loss_options import loss_options
from distill.losses import LOSSES


class RegionPlace(NamedTuple):
    """One region's place: cell (row, column) of a grid of `scale` x `scale`."""

    scale: int
    row: int
    column: int


def cells(scales: Sequence[int]) -> list[RegionPlace]:
    """The regions in the order of a dump: scale by scale, row-major."""
    return [RegionPlace(scale, place // scale, place % scale) for scale in scales for place in range(scale * scale)]


def rule_of(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """The rule that the run's losses call regions complementary by; `class` where none has a rule."""
    for name, options in losses.items():
        known = loss_options(LOSSES[name]) if name in LOSSES else {}
        if "rule" in known:
            return str(options.get("rule", known["rule"][1]))
    return "class"
