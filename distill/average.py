"""The average of a student's weights: timm's, which finds its tensors once and not in every step."""

from __future__ import annotations

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class Average(ModelEmaV3):
    """timm's ModelEmaV3 of one model, the same numbers. It walks both models' tensors in the first update only, which on a GPU
    takes the host 1 to 2 ms; they must stay where they are, as loading a state leaves them."""

    def __init__(self, model: nn.Module, decay: float, use_warmup: bool) -> None:
        super().__init__(model, decay=decay, use_warmup=use_warmup)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Moves the average towards `model`, which is the same in every call; whole numbers are copied."""
        if not self._pairs:
            self._pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        floats = [pair for pair in self._pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [theirs for _, theirs in floats], weight=1.0 - decay)
        for mine, theirs in self._pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)
