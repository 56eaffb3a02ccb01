"""Losses on logits: cross-entropy, KD, DKD, NKD; pure functions that give one value per row, and thin criteria over them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.divergence import RowLoss, Rows, compare, soften, weighted_excess, widen
from distill.losses.inputs import check_pair, check_temperature, check_weights, soft_labels, teacher_of
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelOutput, Target


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """KL divergence of the softened student from the softened teacher, times T^2, per row: [..., K] x 2 -> [...].

    Source: Hinton et al. 2015, sec. 2. mdistiller's kd_loss takes the batch mean here; ours leaves that to the caller.
    Computed in float32 (float64 stays), finite at logits of 1e4, no gradient to the teacher. Raises ValueError for shapes
    that differ and a temperature that is not positive.
    """
    check_pair(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    return _row_loss(student_logits, teacher_logits, None, partial(_kd_rows, temperature=temperature))


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) per row: logits [..., K], labels int [...] -> [...].

    Source: Zhao et al., CVPR 2022, eq. 7; mdistiller a08d46f, `DKD.py`, takes the batch mean. There the logarithm of a sum of
    probabilities is infinite once the target or all else underflows; here both parts are in log space throughout.
    Raises ValueError for soft labels and for fewer than two classes, where the split into target and rest does not exist.
    """
    check_pair(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    if soft_labels(labels, student_logits):
        raise ValueError("dkd splits off one target class per row and got soft labels; give class indices, or use kd or nkd")
    _check_two_classes(student_logits, "dkd")
    rows = partial(_dkd_rows, alpha=alpha, beta=beta, temperature=temperature)
    return _row_loss(student_logits, teacher_logits, labels, rows)


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
    mask_target: bool = True,
) -> Tensor:
    """-p_t[y] log p_s[y] + gamma T^2 H(p_t', p_s') per row: logits [..., K], labels [...] -> [...].

    p' is the softmax at temperature T over the classes other than y; the first part is at temperature 1. Not a divergence:
    positive, with a gradient, also when student and teacher agree. Soft labels [..., K] count as their largest class, as in
    the source: Yang et al., ICCV 2023; yzd-v/cls_KD 1e5d48f, `nkd.py`. `mask_target=False` lets p' run over all classes, as
    SDD's repository does at e412036 (and cls_KD did before October 2023). Raises ValueError for fewer than two classes.
    """
    check_pair(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    if soft_labels(labels, student_logits):
        labels = labels.argmax(-1)
    _check_two_classes(student_logits, "nkd")
    rows = partial(_nkd_rows, gamma=gamma, temperature=temperature, mask_target=mask_target)
    return _row_loss(student_logits, teacher_logits, labels, rows)


def _check_two_classes(logits: Tensor, loss: str) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"{loss} sets one class against the others and got {logits.shape[-1]} class; it needs at least 2")


def _row_loss(student: Tensor, teacher: Tensor, labels: Tensor | None, rows: Rows) -> Tensor:
    """Applies `rows` to logits of any leading shape, in full precision, and gives the losses that shape."""
    shape, classes = student.shape[:-1], student.shape[-1]
    want_gradient = torch.is_grad_enabled() and student.requires_grad
    flat = full_precision(student).reshape(-1, classes)
    fixed = full_precision(teacher.detach()).reshape(-1, classes)
    index = None if labels is None else labels.long().reshape(-1, 1)
    return RowLoss.apply(flat, fixed, index, rows, want_gradient).reshape(shape)


def _kd_rows(
    student: Tensor, teacher: Tensor, labels: Tensor | None, want_gradient: bool, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """T^2 KL; its gradient is T (p_s - p_t)."""
    mine, theirs, divergence = compare(student, teacher, temperature)
    gradient = weighted_excess(mine, theirs, temperature, temperature) if want_gradient else None
    return temperature**2 * divergence, gradient


def _dkd_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, want_gradient: bool, alpha: float, beta: float, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """T^2 (alpha KL(target, rest) + beta KL within the rest).

    `odds` are the log-odds of the rest against the target; the first divergence changes with the student's odds by the
    student's share of the rest less the teacher's, and the odds with the logits by p_s' on the rest and by -1 on the target.
    """
    mine, theirs, divergence = compare(student, teacher, temperature, labels)
    odds = mine.log_normaliser - student.gather(-1, labels) / temperature
    teacher_odds = theirs.log_normaliser - teacher.gather(-1, labels) / temperature
    loss = temperature**2 * (alpha * _binary_divergence(odds, teacher_odds) + beta * divergence)
    if not want_gradient:
        return loss, None
    outwards = alpha * temperature * (odds.sigmoid() - teacher_odds.sigmoid())
    gradient = weighted_excess(mine, theirs, outwards + beta * temperature, beta * temperature)
    return loss, gradient.scatter_(-1, labels, -outwards)


def _binary_divergence(odds: Tensor, teacher_odds: Tensor) -> Tensor:
    """KL of two coins, from their log-odds."""
    heads = F.logsigmoid(teacher_odds) - F.logsigmoid(odds)
    tails = F.logsigmoid(-teacher_odds) - F.logsigmoid(-odds)
    return teacher_odds.sigmoid() * heads + teacher_odds.neg().sigmoid() * tails


def _nkd_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, want_gradient: bool, gamma: float, temperature: float, mask_target: bool
) -> tuple[Tensor, Tensor | None]:
    """-p_t[y] log p_s[y] + gamma T^2 H(p_t', p_s'), the cross-entropy over the rest, or over all classes.

    The gradient is p_t[y] (p_s - onehot) + gamma T (p_s' - p_t').
    """
    logits = widen(student, 1.0)
    student_own, own = logits.gather(-1, labels), teacher.log_softmax(-1).gather(-1, labels).exp().to(logits.dtype)
    whole = soften(logits)
    left_out = labels if mask_target else None
    scaled, theirs = widen(student, temperature, left_out), soften(widen(teacher, temperature, left_out))
    expected = torch.linalg.vecdot(theirs.weights, scaled).unsqueeze(-1) / theirs.normaliser
    mine = soften(scaled)
    rest = mine.log_normaliser - expected
    loss = own * (whole.log_normaliser - student_own) + gamma * temperature**2 * rest
    if not want_gradient:
        return loss, None
    gradient = weighted_excess(mine, theirs, gamma * temperature, gamma * temperature)
    gradient.addcmul_(whole.weights, own / whole.normaliser)
    return loss, gradient.scatter_add_(-1, labels, -own)


class CrossEntropy(Criterion):
    """Cross-entropy with the labels, hard or soft; needs no teacher.

    Args:
        label_smoothing: share of the target spread evenly over all classes, from 0 to 1.
    """

    teacher_needs = None

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing {label_smoothing} must lie in 0..1")
        self.label_smoothing = label_smoothing

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B] or float [B, K]."""
        logits, labels = full_precision(student.logits), target.labels
        labels = labels.to(logits.dtype) if soft_labels(labels, logits) else labels.long()
        with no_autocast(logits):
            # Cross-entropy passes over label -100 by default, which would hide a wrong label on a GPU; no label is passed over.
            none = torch.iinfo(torch.int64).min
            return F.cross_entropy(logits, labels, ignore_index=none, label_smoothing=self.label_smoothing), {}


class KD(Criterion):
    """Knowledge distillation (Hinton et al. 2015): the batch mean of `kd_loss`.

    Args:
        temperature: what both models' logits are divided by; the loss is multiplied by its square.
    """

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; the labels, hard or soft, are not read."""
        teacher = teacher_of(teacher, "kd")
        return kd_loss(student.logits, teacher.logits, self.temperature).mean(), {}


class DKD(Criterion):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022): the batch mean of `dkd_loss`.

    Args:
        alpha: weight of the target class against the rest.
        beta: weight of the classes other than the target among themselves; 8 for most CIFAR-100 pairs, 0.5 to 2 on ImageNet.
        temperature: what both models' logits are divided by; 4 on CIFAR-100, 1 on ImageNet.
    """

    accepts_soft_labels = False

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weights(alpha=alpha, beta=beta)
        self.options = {"alpha": alpha, "beta": beta, "temperature": temperature}

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B]."""
        teacher = teacher_of(teacher, "dkd")
        return dkd_loss(student.logits, teacher.logits, target.labels, **self.options).mean(), {}


class NKD(Criterion):
    """Normalised knowledge distillation (Yang et al., ICCV 2023): the batch mean of `nkd_loss`.

    Args:
        gamma: weight of the part over the classes other than the target; 1.5 on ImageNet.
        temperature: temperature of that part; 1 on ImageNet.
        mask_target: leave the target out of that part, as the paper; False is what SDD's repository computes.
    """

    def __init__(self, *, gamma: float = 1.5, temperature: float = 1.0, mask_target: bool = True) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weights(gamma=gamma)
        self.gamma, self.temperature, self.mask_target = gamma, temperature, mask_target

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B], or float [B, K] of which the largest class counts."""
        teacher = teacher_of(teacher, "nkd")
        rows = nkd_loss(student.logits, teacher.logits, target.labels, self.gamma, self.temperature, self.mask_target)
        return rows.mean(), {}
