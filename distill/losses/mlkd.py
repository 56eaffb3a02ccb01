"""MLKD: multi-level logit distillation (Jin, Wang and Lin, CVPR 2023) on plain and altered views of the same images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.inputs import check_classes, check_pair, check_temperature, teacher_of
from distill.losses.logits import kd_loss
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Target

BOTH_VIEWS = (3.0, 5.0)
"""Temperatures beside the base one, as published."""
MISREAD = (2.0, 6.0)
"""The others. The released code means to compare altered views at them, and compares the plain ones a second time."""


class Levels(NamedTuple):
    """The three parts of the loss, scalars."""

    instances: Tensor
    batch: Tensor
    classes: Tensor


def mlkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    plain: Tensor,
    temperature: float = 4.0,
    standardise: bool = False,
    mended: bool = False,
) -> Levels:
    """Divergences of rows, and squared differences of P P^T (images) and P^T P (classes): logits [B, K] x 2, plain bool [B].

    Each is summed over `temperature`, 3, 5, 2 and 6; P is the softmax of the plain rows. With B rows, half of them plain, the
    parts are those of Jin-Ying/Multi-Level-Logit-Distillation 5ee473f, `KD_ours.py`. With other shares a plain row counts 2/B
    and an altered row 2/B, so the mean over processes is the same however they share the rows; P P^T is of each process's own.

    As released, the share of the plain rows on which the teacher is at most as sure as on their median is a factor of both
    parts of rows, and the share of the classes that have at most the median of its probability is one of the part of classes.
    `mended` selects these rows and classes instead, as a comment of the code does, and compares altered rows at all
    temperatures (see `MISREAD`). `standardise` is of the divergences alone, as released. Computed in float32 (float64 stays),
    divergences as `kd_loss`; no gradient to the teacher. Parts without rows are exactly 0. Raises ValueError as `kd_loss`, and
    for a `plain` of another type or shape.
    """
    check_pair(student_logits, teacher_logits, "logits", dimensions=2)
    if plain.dtype != torch.bool or plain.shape != student_logits.shape[:1]:
        raise ValueError(f"plain is {plain.dtype} {list(plain.shape)}; it must be bool [{len(student_logits)}], one per row")
    with no_autocast(student_logits):
        mine, theirs = full_precision(student_logits), full_precision(teacher_logits.detach())
        rows, classes = least_sure(theirs, plain, mended)
        weak = plain.to(mine.dtype)
        instances = batch = by_class = mine.new_zeros(())
        for number, each in enumerate((temperature, *BOTH_VIEWS, *MISREAD)):
            misread = not mended and number > len(BOTH_VIEWS)
            weights = rows * weak + (weak if misread else 1 - weak)
            instances = instances + (weights * kd_loss(student_logits, teacher_logits, each, standardise)).sum()
            softened, fixed = ((logits / each).softmax(-1) * weak[:, None] for logits in (mine, theirs))
            batch = batch + (rows * (fixed @ fixed.T - softened @ softened.T).square()).sum()
            by_class = by_class + (classes * (fixed.T @ fixed - softened.T @ softened).square()).sum()
        share = 2 / len(mine)
        return Levels(share * instances, share * batch, 2 * weak.mean() / mine.shape[1] * by_class)


def least_sure(teacher_logits: Tensor, plain: Tensor, selected: bool) -> tuple[Tensor, Tensor]:
    """Of the plain rows those whose largest probability is at most its median, and the classes whose summed probability is.

    `selected`: 1 for each of these rows [B] and classes [K], 0 for the others; else their shares, two scalars.
    """
    probabilities = teacher_logits.softmax(-1)
    # a quantile that passes over NaN: picking the rows out would make the host wait for their number
    sureness = probabilities.amax(-1).masked_fill(~plain, torch.nan)
    rows = (sureness <= sureness.nanquantile(0.5)).to(teacher_logits.dtype)
    of_class = (probabilities * plain[:, None]).sum(0)
    classes = (of_class <= of_class.quantile(0.5)).to(teacher_logits.dtype)
    return (rows, classes) if selected else (rows.sum() / plain.sum().clamp_min(1), classes.mean())


class MLKD(Criterion):
    """Multi-level logit distillation (Jin et al., CVPR 2023): instances, batch and classes, on plain and altered views.

    It takes `augment.repeats` 2 and `augment.plain_repeats` 1, which say the rows apart. The released runs have weight 0.9
    beside 0.1 of cross-entropy on either view, which is 0.2 of ours, the mean over both.

    Args:
        student: facts of the student; only the number of its classes is looked at.
        teacher: facts of the teacher, likewise.
        temperature: the base temperature, beside 2, 3, 5 and 6.
        standardise: give every row of both models' logits mean 0 and deviation 1 in the part of instances (LSKD); the papers
            then take a temperature of 2 and a weight of 9 or 6.
        mended: select rows and classes where the released code multiplies by their share, and compare altered views at all
            temperatures; the published numbers were made without.
    """

    student_needs = teacher_needs = Needs(logits=True)
    reads_plain = True

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        temperature: float = 4.0,
        standardise: bool = False,
        mended: bool = False,
    ) -> None:
        super().__init__()
        check_classes(student, teacher, "mlkd")
        check_temperature(temperature)
        self.temperature, self.standardise, self.mended = temperature, standardise, mended

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the three parts; and each of them. The labels are not read."""
        teacher = teacher_of(teacher, "mlkd")
        if target.plain is None:
            raise ValueError("mlkd tells plain views from altered ones and was not told which are; give Target(plain=...)")
        levels = mlkd_loss(student.logits, teacher.logits, target.plain, self.temperature, self.standardise, self.mended)
        return torch.stack(levels).sum(), {name: part.detach() for name, part in levels._asdict().items()}
