"""The one module that DDP wraps: the student and every trained part of the losses. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn

from distill.optim import Schedule
from distill.protocols import Losses, ModelOutput, Progress


class Distiller(nn.Module):
    """Student backbone + weighted criteria: images in, losses out.

    `criteria` are `nn.Module`s that satisfy `protocols.Criterion`, each with the schedule of its weight. A term whose weight
    is 0 is still computed: its projector must take part in every step for DDP, and its value is wanted in the log.
    """

    def __init__(
        self,
        student: nn.Module,
        criteria: Mapping[str, nn.Module],
        weights: Mapping[str, Schedule],
        before_losses: Callable[[], None] = lambda: None,
    ) -> None:
        """before_losses: called when the student's forward pass is launched and the teacher's outputs are about to be read."""
        super().__init__()
        if criteria.keys() != weights.keys():
            raise ValueError(f"criteria {sorted(criteria)} and weights {sorted(weights)} differ; each term needs both")
        self.student = student
        self.criteria = nn.ModuleDict(criteria)
        self.weights = dict(weights)
        self.before_losses = before_losses

    def forward(self, images: Tensor, labels: Tensor, teacher: ModelOutput | None, progress: Progress) -> Losses:
        """images float [B, 3, H, W] in [0, 1]; labels int64 [B] or float [B, K] -> `Losses`."""
        output = self.student(images)
        self.before_losses()
        terms: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for name, criterion in self.criteria.items():
            terms[name], found = criterion(output, teacher, labels)
            statistics |= {f"{name}/{key}": value for key, value in found.items()}
        weighted = [self.weights[name](progress) * term for name, term in terms.items()]
        total = weighted[0]
        for term in weighted[1:]:
            total = total + term
        return Losses(total, terms, statistics)

    @property
    def plain_student(self) -> nn.Module:
        """The timm model inside the student's backbone."""
        return cast(nn.Module, self.student.model)

    def trained_state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps: the plain student and the criteria's parameters, apart."""
        return {"student": self.plain_student.state_dict(), "criteria": self.criteria.state_dict()}
