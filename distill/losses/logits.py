"""Losses on the logits of both models: KD, DKD, NKD; pure functions, one value per row, and thin criteria over them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.divergence import (
    RowLoss,
    Rows,
    RowValues,
    Temperature,
    compare,
    cooling,
    mean_logit,
    soften,
    weighted_excess,
    widen,
)
from distill.losses.inputs import check_pair, check_temperature, check_weights, soft_labels, teacher_of
from distill.precision import double_precision, full_precision, no_autocast
from distill.protocols import Criterion, ModelOutput, Needs, Target

EPS = 1e-7
"""What logit standardisation adds to a row's deviation, as the released code."""


def standardise(logits: Tensor, eps: float = EPS) -> Tensor:
    """(z - mean) / (eps + deviation) over the classes: [..., K] -> [..., K]; the deviation is the unbiased one (K - 1).

    Source: Sun et al., CVPR 2024; sunshangquan/logit-standardization-KD f6e5aa5, `normalize`. With two classes it is +-0.7071
    whatever the logits, and a row of equal logits is 0 with a gradient of up to 1/eps. The losses' option `standardise` does
    the same in double precision within their own sweep. Computed in float32 (float64 stays).
    """
    with no_autocast(logits):
        wide = full_precision(logits)
        return (wide - wide.mean(-1, keepdim=True)) / (eps + wide.std(-1, keepdim=True))


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: Temperature = 4.0, standardise: bool = False
) -> Tensor:
    """KL divergence of the softened student from the softened teacher, times T^2, per row: [..., K] x 2 -> [...].

    Source: Hinton et al. 2015, sec. 2. mdistiller's kd_loss takes the batch mean here; ours leaves that to the caller.
    A temperature that is a tensor of one element gets its gradient, d(T^2 KL)/dT. `standardise` compares `standardise` of
    both. Computed in float32 (float64 stays), finite at logits of 1e4, no gradient to the teacher. Raises ValueError for
    shapes that differ and a temperature that is not positive.
    """
    check_pair(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    return _row_loss(student_logits, teacher_logits, None, _kd_rows, temperature, standardise)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: Temperature = 4.0,
    standardise: bool = False,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) per row: logits [..., K], labels int [...] -> [...].

    Source: Zhao et al., CVPR 2022, eq. 7; mdistiller a08d46f, `DKD.py`, takes the batch mean. There the logarithm of a sum of
    probabilities is infinite once the target or all else underflows; here both parts are in log space throughout. The
    temperature and `standardise` are as in `kd_loss`; the class that the second part leaves out has no part in the
    temperature's gradient either (the reference's is NaN there under PyTorch 2).
    Raises ValueError for soft labels and for fewer than two classes, where the split into target and rest does not exist.
    """
    check_pair(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    if soft_labels(labels, student_logits):
        raise ValueError("dkd splits off one target class per row and got soft labels; give class indices, or use kd or nkd")
    _check_two_classes(student_logits, "dkd")
    return _row_loss(
        student_logits, teacher_logits, labels, partial(_dkd_rows, alpha=alpha, beta=beta), temperature, standardise
    )


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    gamma: float = 1.5,
    temperature: float = 1.0,
    mask_target: bool = True,
    standardise: bool = False,
) -> Tensor:
    """-p_t[y] log p_s[y] + gamma T^2 H(p_t', p_s') per row: logits [..., K], labels [...] -> [...].

    p' is the softmax at temperature T over the classes other than y; the first part is at temperature 1. Not a divergence:
    positive, with a gradient, also when student and teacher agree. Soft labels [..., K] count as their largest class, as in
    the source: Yang et al., ICCV 2023; yzd-v/cls_KD 1e5d48f, `nkd.py`. `mask_target=False` lets p' run over all classes, as
    SDD's repository does at e412036 (and cls_KD did before October 2023). `standardise` is as in `kd_loss`; no one has
    published it with NKD. Raises ValueError for fewer than two classes.
    """
    check_pair(student_logits, teacher_logits, "logits")
    check_temperature(temperature)
    if soft_labels(labels, student_logits):
        labels = labels.argmax(-1)
    _check_two_classes(student_logits, "nkd")
    rows = partial(_nkd_rows, gamma=gamma, mask_target=mask_target)
    return _row_loss(student_logits, teacher_logits, labels, rows, temperature, standardise)


def _check_two_classes(logits: Tensor, loss: str) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"{loss} sets one class against the others and got {logits.shape[-1]} class; it needs at least 2")


def _row_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    rows_at: Callable[..., RowValues],
    temperature: Temperature,
    standardised: bool,
) -> Tensor:
    """Applies `rows_at(temperature=...)` to logits of any leading shape, in full precision, and gives the losses that shape."""
    shape, classes = student.shape[:-1], student.shape[-1]
    if standardised and classes < 2:
        raise ValueError("standardise divides by the deviation over classes and got 1 class; it needs at least 2")
    trained = None
    if isinstance(temperature, Tensor):
        trained = double_precision(temperature).reshape(())
        temperature = trained.detach()
    wanting = student.requires_grad or (trained is not None and trained.requires_grad)
    flat = full_precision(student).reshape(-1, classes)
    fixed = full_precision(teacher.detach()).reshape(-1, classes)
    index = None if labels is None else labels.long().reshape(-1, 1)
    rows: Rows = partial(rows_at, temperature=temperature)
    if standardised:
        rows = partial(_standardised_rows, rows=rows)
    return RowLoss.apply(flat, fixed, index, trained, rows, torch.is_grad_enabled() and wanting).reshape(shape)


def _standardised_rows(student: Tensor, teacher: Tensor, labels: Tensor | None, want_gradient: bool, rows: Rows) -> RowValues:
    """`rows` of both standardised.

    The gradient goes back through n = (z - mean) / scale, and through scale = eps + deviation, whose own gradient is
    (z - mean) / ((K - 1) deviation), or 0 where the deviation is.
    """
    (mine, deviation), (theirs, _) = _standardised(student), _standardised(teacher)
    losses, gradient, slope = rows(mine, theirs, labels, want_gradient)
    if gradient is None:
        return RowValues(losses, None, slope)
    scale = deviation + EPS
    through_scale = torch.linalg.vecdot(gradient, mine / scale).unsqueeze(-1)
    direct = gradient.div_(scale)
    direct = direct.sub_(direct.mean(-1, keepdim=True))
    degrees = (mine.shape[-1] - 1) * deviation
    share = torch.where(deviation > 0, through_scale / degrees, 0)
    return RowValues(losses, direct.sub_(mine.mul_(scale).mul_(share)), slope)


def _standardised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in double precision, with mean 0 and deviation 1, and the deviation they had, [n, 1]."""
    wide = widen(logits, 1.0)
    deviation = wide.std(-1, keepdim=True)
    return wide.sub_(wide.mean(-1, keepdim=True)).div_(deviation + EPS), deviation


def _kd_rows(
    student: Tensor, teacher: Tensor, labels: Tensor | None, want_gradient: bool, temperature: Temperature
) -> RowValues:
    """T^2 KL; its gradient is T (p_s - p_t), its slope 2 T KL + T^2 dKL/dT."""
    mine, theirs, divergence = compare(student, teacher, temperature)
    losses = temperature**2 * divergence
    if not want_gradient:
        return RowValues(losses)
    slope = None
    if isinstance(temperature, Tensor):
        cooled = cooling(widen(student, temperature), widen(teacher, temperature), mine, theirs)
        slope = temperature * (2 * divergence - cooled)
    # last, for it takes the place of both weights
    return RowValues(losses, weighted_excess(mine, theirs, temperature, temperature), slope)


def _dkd_rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    want_gradient: bool,
    alpha: float,
    beta: float,
    temperature: Temperature,
) -> RowValues:
    """T^2 (alpha KL(target, rest) + beta KL within the rest).

    `odds` are the log-odds of the rest against the target; the first divergence changes with the student's odds by the
    student's share of the rest less the teacher's, and the odds with the logits by p_s' on the rest and by -1 on the target.
    """
    mine, theirs, divergence = compare(student, teacher, temperature, labels)
    own, teacher_own = (logits.gather(-1, labels) / temperature for logits in (student, teacher))
    odds, teacher_odds = mine.log_normaliser - own, theirs.log_normaliser - teacher_own
    losses = temperature**2 * (alpha * _binary_divergence(odds, teacher_odds) + beta * divergence)
    if not want_gradient:
        return RowValues(losses)
    slope = None
    if isinstance(temperature, Tensor):
        scaled, teacher_scaled = widen(student, temperature, labels), widen(teacher, temperature, labels)
        cooled, teacher_cooled = mean_logit(mine, scaled) - own, mean_logit(theirs, teacher_scaled) - teacher_own
        within = beta * cooling(scaled, teacher_scaled, mine, theirs)
        outside = alpha * _cooling_of_a_coin(odds, teacher_odds, cooled, teacher_cooled)
        slope = 2 * losses / temperature - temperature * (outside + within)
    outwards = alpha * temperature * (odds.sigmoid() - teacher_odds.sigmoid())
    gradient = weighted_excess(mine, theirs, outwards + beta * temperature, beta * temperature)
    return RowValues(losses, gradient.scatter_(-1, labels, -outwards), slope)


def _cooling_of_a_coin(odds: Tensor, teacher_odds: Tensor, cooled: Tensor, teacher_cooled: Tensor) -> Tensor:
    """-T dKL/dT of two coins; `cooled` are -T d(odds)/dT of each."""
    mine, theirs = odds.sigmoid(), teacher_odds.sigmoid()
    return (mine - theirs) * cooled + theirs * (1 - theirs) * (teacher_odds - odds) * teacher_cooled


def _binary_divergence(odds: Tensor, teacher_odds: Tensor) -> Tensor:
    """KL of two coins, from their log-odds."""
    heads = F.logsigmoid(teacher_odds) - F.logsigmoid(odds)
    tails = F.logsigmoid(-teacher_odds) - F.logsigmoid(-odds)
    return teacher_odds.sigmoid() * heads + teacher_odds.neg().sigmoid() * tails


def _nkd_rows(
    student: Tensor, teacher: Tensor, labels: Tensor, want_gradient: bool, gamma: float, mask_target: bool, temperature: float
) -> RowValues:
    """-p_t[y] log p_s[y] + gamma T^2 H(p_t', p_s'), the cross-entropy over the rest, or over all classes.

    The gradient is p_t[y] (p_s - onehot) + gamma T (p_s' - p_t').
    """
    logits = widen(student, 1.0)
    student_own, own = logits.gather(-1, labels), teacher.log_softmax(-1).gather(-1, labels).exp().to(logits.dtype)
    whole = soften(logits)
    left_out = labels if mask_target else None
    scaled, theirs = widen(student, temperature, left_out), soften(widen(teacher, temperature, left_out))
    expected = mean_logit(theirs, scaled)
    mine = soften(scaled)
    rest = mine.log_normaliser - expected
    loss = own * (whole.log_normaliser - student_own) + gamma * temperature**2 * rest
    if not want_gradient:
        return RowValues(loss)
    gradient = weighted_excess(mine, theirs, gamma * temperature, gamma * temperature)
    gradient.addcmul_(whole.weights, own / whole.normaliser)
    return RowValues(loss, gradient.scatter_add_(-1, labels, -own))


class KD(Criterion):
    """Knowledge distillation (Hinton et al. 2015): the batch mean of `kd_loss`.

    Args:
        temperature: what both models' logits are divided by; the loss is multiplied by its square.
        standardise: give every row of both models' logits mean 0 and deviation 1 first (LSKD); the papers then take a
            temperature of 2, a weight of 9 and 0.1 of cross-entropy.
    """

    student_needs = teacher_needs = Needs(logits=True)

    def __init__(self, *, temperature: float = 4.0, standardise: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.standardise = temperature, standardise
        self.teacher_temperature = None if standardise else temperature

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; the labels, hard or soft, are not read."""
        teacher = teacher_of(teacher, "kd")
        return kd_loss(student.logits, teacher.logits, self.temperature, self.standardise).mean(), {}


class DKD(Criterion):
    """Decoupled knowledge distillation (Zhao et al., CVPR 2022): the batch mean of `dkd_loss`.

    Args:
        alpha: weight of the target class against the rest.
        beta: weight of the classes other than the target among themselves; 8 for most CIFAR-100 pairs, 0.5 to 2 on ImageNet.
        temperature: what both models' logits are divided by; 4 on CIFAR-100, 1 on ImageNet.
        standardise: give every row of both models' logits mean 0 and deviation 1 first (LSKD); the papers then take a
            temperature of 2, alpha 9, beta 72 and 0.1 of cross-entropy.
    """

    student_needs = teacher_needs = Needs(logits=True)
    accepts_soft_labels = False

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, standardise: bool = False) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weights(alpha=alpha, beta=beta)
        self.loss = partial(dkd_loss, alpha=alpha, beta=beta, temperature=temperature, standardise=standardise)
        self.teacher_temperature = None if standardise else temperature

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B]."""
        teacher = teacher_of(teacher, "dkd")
        return self.loss(student.logits, teacher.logits, target.labels).mean(), {}


class NKD(Criterion):
    """Normalised knowledge distillation (Yang et al., ICCV 2023): the batch mean of `nkd_loss`.

    Args:
        gamma: weight of the part over the classes other than the target; 1.5 on ImageNet.
        temperature: temperature of that part; 1 on ImageNet.
        mask_target: leave the target out of that part, as the paper; False is what SDD's repository computes.
        standardise: give every row of both models' logits mean 0 and deviation 1 first.
    """

    student_needs = teacher_needs = Needs(logits=True)

    def __init__(
        self, *, gamma: float = 1.5, temperature: float = 1.0, mask_target: bool = True, standardise: bool = False
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        check_weights(gamma=gamma)
        self.loss = partial(nkd_loss, gamma=gamma, temperature=temperature, mask_target=mask_target, standardise=standardise)
        self.teacher_temperature = None if standardise else temperature

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B], or float [B, K] of which the largest class counts."""
        teacher = teacher_of(teacher, "nkd")
        return self.loss(student.logits, teacher.logits, target.labels).mean(), {}
