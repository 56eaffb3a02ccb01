"""CTKD: curriculum temperature (Li et al., AAAI 2023): a trained temperature that makes the student's task harder."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distill.losses.inputs import check_weights, teacher_of
from distill.losses.logits import dkd_loss, kd_loss
from distill.protocols import Criterion, ModelOutput, Needs, Target

Base = Literal["kd", "dkd"]
Shape = Literal["cosine", "linear"]


def curriculum(epoch: int, loops: int, shape: Shape = "cosine") -> float:
    """The share of the temperature's gradient that this epoch, counted from 1, takes: 0 at epoch 0, rising over `loops` epochs.

    `cosine` is (1 - cos(pi min(e, E) / E)) / 2, which ends at 1. `linear` is min(e, E - 1) / E: the released code stops one
    epoch short. Source: zhengli97/CTKD 7d52524, `models/temp_global.py`, where it is negative; the sign is in
    `reverse_gradient` here.
    """
    if shape == "linear":
        return min(epoch, loops - 1) / loops
    return (1 - math.cos(math.pi * min(epoch, loops) / loops)) / 2


class _ReverseGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by -factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * -ctx.factor, None


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; what is minimised behind it, x maximises, `factor` times as fast."""
    return _ReverseGradient.apply(x, factor)


class CTKD(Criterion):
    """Curriculum temperature (CTKD; Li et al., AAAI 2023): KD or DKD whose temperature is trained to raise the loss.

    T = start + span * sigmoid(g): the student minimises the loss, the one scalar g maximises it, by `curriculum` of the epoch.
    T begins at 15.62 and stays within (1, 21) as published. Logits only, so any pair of one set of classes. The teacher's
    instance-wise variant was never released. g trains inside the distiller, with the gradient of the joint batch on every
    rank; the released code leaves it outside DDP, where ranks drift apart.

    Args:
        base: kd, or dkd, which needs hard labels.
        start: lowest temperature.
        span: highest temperature less the lowest.
        epochs: epochs until g takes its whole gradient: 10 on CIFAR-100, 5 on ImageNet.
        shape: of the rise over these epochs: cosine, or linear as released, which ends at 1 - 1/epochs.
        decay_temperature: let the optimiser treat g as any other parameter of one dimension. The released code decays it,
            which pulls T to the middle of its range (11), and the published numbers were made so; false never decays it.
        alpha: of dkd.
        beta: of dkd; 8 for most CIFAR-100 pairs.
        standardise: give every row of both models' logits mean 0 and deviation 1 first (LSKD).
    """

    student_needs = teacher_needs = Needs(logits=True)

    def __init__(
        self,
        *,
        base: Base = "kd",
        start: float = 1.0,
        span: float = 20.0,
        epochs: int = 10,
        shape: Shape = "cosine",
        decay_temperature: bool = True,
        alpha: float = 1.0,
        beta: float = 8.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("base", base, get_args(Base)), ("shape", shape, get_args(Shape))):
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
        if not 0 < start < math.inf:
            raise ValueError(f"start {start} must be positive and finite: it is the lowest temperature")
        if epochs < 1:
            raise ValueError(f"epochs {epochs} must be at least 1: the rise of the curriculum takes so many")
        check_weights(span=span, alpha=alpha, beta=beta)
        self.base, self.start, self.span = base, start, span
        self.epochs, self.shape = epochs, shape
        self.alpha, self.beta, self.standardise = alpha, beta, standardise
        self.g = nn.Parameter(torch.ones(1))
        self.no_weight_decay = frozenset() if decay_temperature else frozenset({"g"})
        self.accepts_soft_labels = base != "dkd"

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; the temperature of this step and the share of its gradient that g takes, in reverse."""
        teacher = teacher_of(teacher, "ctkd")
        share = curriculum(target.progress.epoch + 1, self.epochs, self.shape)
        temperature = self.start + self.span * reverse_gradient(self.g, share).sigmoid()
        if self.base == "kd":
            rows = kd_loss(student.logits, teacher.logits, temperature, self.standardise)
        else:
            weights = (self.alpha, self.beta)
            rows = dkd_loss(student.logits, teacher.logits, target.labels, *weights, temperature, self.standardise)
        shown = temperature.detach().squeeze(0)
        return rows.mean(), {"temperature": shown, "curriculum": torch.full_like(shown, share)}
