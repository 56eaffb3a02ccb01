"""Scale Decoupled Distillation (Luo, CVPR 2024, arXiv 2403.13512) over KD, DKD or NKD, for any set of regions.

Defaults are those of the released code (shicaiwei123/SDD-CVPR2024 at e412036), which the published numbers were made with,
but for the pooling (`regions.pooling_matrix`); where the paper says otherwise, its reading is an option.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from distill.losses.inputs import check_pair, check_temperature, check_weights, soft_labels, teacher_of
from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelOutput, Needs, Regions, Target
from distill.regions import RULES, Mode, Rule, disagreeing, pooling_matrix, scale_slices

log = logging.getLogger(__name__)

BASES: dict[str, Callable[..., Tensor]] = {"kd": kd_loss, "dkd": dkd_loss, "nkd": nkd_loss}
Reduction = Literal["mean", "sum"]
REDUCTIONS = get_args(Reduction)
Reliability = Literal["none", "confidence", "mean"]
RELIABILITIES = get_args(Reliability)


def sdd_loss(
    student_regions: Tensor,
    teacher_regions: Tensor,
    labels: Tensor,
    base: str = "kd",
    complementary_weight: float = 2.0,
    rule: str = "label",
    reduction: str = "mean",
    base_options: Mapping[str, Any] | None = None,
    reliability: Reliability = "none",
    reliability_floor: float = 0.2,
    reliability_power: float = 1.0,
    consistent_weight: float = 1.0,
) -> Tensor:
    """The base loss of every region, weighted by its kind, over regions and batch: a scalar.

    student_regions, teacher_regions: logits [B, R, K], the global region first; labels int [B] or soft, float [B, K].
    `base_options` are keyword arguments of the base loss (`temperature`, ...); what is left out takes its default.
    `rule` is that of `complementary`; soft labels have no right or wrong, so the `class` rule then serves, with a note in
    the log. `reduction`: `mean` over regions and batch (the released code), or `sum` over regions, mean over the batch
    (eq. 9-10 of the paper): R times as much. Weights are not normalised: the mean is 1 to `complementary_weight` times the
    plain mean, or with a `consistent_weight` of 0 the complementary regions' part alone. `reliability` weighs regions by
    `region_reliability` at the base's temperature (`confidence`), or, to see what the smaller loss alone does, all of them by
    its mean over the batch (`mean`). Computed in float32 (float64 stays), no
    gradient to the teacher. Raises ValueError for shapes, labels, names and options that cannot be right.
    """
    check_choices(base, rule, reduction, base_options)
    check_reliability(reliability, reliability_floor, reliability_power)
    losses, outside = region_losses(student_regions, teacher_regions, labels, base, rule, base_options)
    temperature = base_temperature(base, base_options)
    trust = _trust(teacher_regions, temperature, reliability, reliability_floor, reliability_power)
    return _weighted(losses if trust is None else losses * trust, outside, (consistent_weight, complementary_weight), reduction)


def region_reliability(teacher_regions: Tensor, temperature: float = 4.0, floor: float = 0.2, power: float = 1.0) -> Tensor:
    """The teacher's confidence in each region: [B, R, K] -> [B, R], from `floor` to 1, without a gradient.

    c = (largest softmax at the temperature - 1 / K) / (1 - 1 / K); floor + (1 - floor) c^power. The largest class counts, not
    the label. Source: Cherxy/RSM-SDD a70c86c. It is not normalised, so it makes the loss smaller: by more than half at T 4.
    Raises ValueError for one class.
    """
    classes = teacher_regions.shape[-1]
    if classes < 2:
        raise ValueError(f"reliability compares a class with the others and got {classes} class; it needs at least 2")
    with no_autocast(teacher_regions):
        largest = (full_precision(teacher_regions.detach()) / temperature).softmax(-1).amax(-1)
        confidence = ((largest - 1 / classes) / (1 - 1 / classes)).clamp(0, 1)
        return floor + (1 - floor) * confidence**power


def _trust(teacher_regions: Tensor, temperature: float, reliability: str, floor: float, power: float) -> Tensor | None:
    if reliability == "none":
        return None
    trust = region_reliability(teacher_regions, temperature, floor, power)
    return trust if reliability == "confidence" else trust.mean().expand_as(trust)


def base_temperature(base: str, base_options: Mapping[str, Any] | None) -> float:
    """The temperature that a base loss is computed at: that of its options, or its default."""
    return (base_options or {}).get("temperature", signature(BASES[base]).parameters["temperature"].default)


def check_reliability(reliability: str, floor: float, power: float) -> None:
    """Raises ValueError for an unknown reliability, a floor outside 0..1 and a power that is not positive."""
    if reliability not in RELIABILITIES:
        raise ValueError(f"reliability {reliability!r} is unknown; choose one of {', '.join(RELIABILITIES)}")
    if not 0 <= floor <= 1:
        raise ValueError(f"reliability_floor {floor} must lie in 0..1")
    if not 0 < power < float("inf"):
        raise ValueError(f"reliability_power {power} must be positive and finite")


def region_losses(
    student_regions: Tensor,
    teacher_regions: Tensor,
    labels: Tensor,
    base: str,
    rule: str,
    base_options: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """The base loss of each region [B, R], unweighted, and which regions are complementary, bool [B, R]."""
    check_pair(student_regions, teacher_regions, "region logits", dimensions=3)
    soft = soft_labels(labels, student_regions[:, 0])
    if soft and rule == "label":
        _note_class_rule()
        rule = "class"
    options = dict(base_options or {})
    if base == "kd":
        losses = kd_loss(student_regions, teacher_regions, **options)
    else:
        shape = student_regions.shape if soft else student_regions.shape[:2]
        losses = BASES[base](student_regions, teacher_regions, labels.unsqueeze(1).expand(shape), **options)
    return losses, complementary(teacher_regions, labels, rule)


def complementary(teacher_regions: Tensor, labels: Tensor, rule: str) -> Tensor:
    """A mask of the complementary regions, bool [B, R], by `disagreeing` over the teacher's classes.

    teacher_regions [B, R, K]; labels int [B] for the `label` rule, not read by `class`. The student plays no part.
    """
    return disagreeing(teacher_regions.detach().argmax(-1), labels, rule)


def check_choices(base: str, rule: str, reduction: str, base_options: Mapping[str, Any] | None) -> None:
    """Raises ValueError for a name that does not exist and for an option that the base does not take."""
    for name, value, allowed in (("base", base, tuple(BASES)), ("rule", rule, RULES), ("reduction", reduction, REDUCTIONS)):
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")
    taken = [name for name in signature(BASES[base]).parameters if name not in ("student_logits", "teacher_logits", "labels")]
    if unknown := [name for name in base_options or {} if name not in taken]:
        raise ValueError(
            f"base {base!r} takes no option {' and no '.join(map(repr, unknown))}; it takes {', '.join(taken)};"
            f" drop what it does not take: {' '.join(f'--loss.sdd.{name} null' for name in unknown)}"
        )


@torch.compiler.assume_constant_result
def _note_class_rule() -> bool:
    """Says so once per process: a rule other than the one asked for is not taken in silence."""
    return _noted_class_rule()


@lru_cache(maxsize=1)
def _noted_class_rule() -> bool:
    log.warning("soft labels: SDD's rule 'label' needs one class per image, so complementary regions follow rule 'class'")
    return True


def _weighted(losses: Tensor, outside: Tensor, weights: tuple[float, float], reduction: str) -> Tensor:
    """weights: of consistent and of complementary regions."""
    consistent, complementary = weights
    of_each = torch.full_like(losses, consistent).masked_fill(outside, complementary)
    return _reduce(losses * of_each, reduction)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses.mean() if reduction == "mean" else losses.sum(1).mean()


class SDD(Criterion):
    """Scale Decoupled Distillation over KD, DKD or NKD (arXiv 2403.13512).

    Args:
        base: the loss of each region, kd, dkd or nkd.
        scales: grids of regions, 1 (the whole image) first; (1, 2) for similar, (1, 2, 4) for different architectures.
        pooling: area (regions partition the image), adaptive (each scale from the full map) or cascade (the released code).
        complementary_weight: weight of regions that disagree with the whole image.
        consistent_weight: weight of the others, the whole image among them; 0 leaves them out (the paper's Table 6).
        rule: what disagreeing means; label (the released code) or class (the paper's text, and always with soft labels).
        reduction: mean over regions (the released code) or their sum (the paper).
        temperature: of the base; None is the base's own default.
        alpha: of dkd; None is its default.
        beta: of dkd; None is its default.
        gamma: of nkd; None is its default.
        mask_target: of nkd; None is its default, False what the released code computes.
        reliability: none; confidence (regions weigh by how sure the teacher is of them, RSM); mean (all by its mean: a
            control).
        reliability_floor: least weight of a region.
        reliability_power: of the confidence.
        standardise: of every base (LSKD): each region's logits get mean 0 and deviation 1 on their own, so a region of flat
            logits counts as much as a sharp one. Which regions are complementary does not change.
    """

    def __init__(
        self,
        *,
        base: Literal["kd", "dkd", "nkd"] = "kd",
        scales: tuple[int, ...] = (1, 2),
        pooling: Mode = "area",
        complementary_weight: float = 2.0,
        consistent_weight: float = 1.0,
        rule: Rule = "label",
        reduction: Reduction = "mean",
        temperature: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        mask_target: bool | None = None,
        reliability: Reliability = "none",
        reliability_floor: float = 0.2,
        reliability_power: float = 1.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        given = {"temperature": temperature, "alpha": alpha, "beta": beta, "gamma": gamma, "mask_target": mask_target}
        given["standardise"] = standardise or None
        self.base_options = {name: value for name, value in given.items() if value is not None}
        check_choices(base, rule, reduction, self.base_options)
        if temperature is not None:
            check_temperature(temperature)
        check_weights(
            complementary_weight=complementary_weight, consistent_weight=consistent_weight, alpha=alpha, beta=beta, gamma=gamma
        )
        check_reliability(reliability, reliability_floor, reliability_power)
        self.trust = partial(
            _trust,
            temperature=base_temperature(base, self.base_options),
            reliability=reliability,
            floor=reliability_floor,
            power=reliability_power,
        )
        pooling_matrix(1, 1, scales, pooling)  # raises for scales and a pooling that no map can have
        if scales[0] != 1:
            raise ValueError(f"scales {list(scales)} must begin with 1, the whole image that regions are compared with")
        self.base, self.rule, self.reduction = base, rule, reduction
        self.scales, self.weights = tuple(scales), (consistent_weight, complementary_weight)
        self.regions = Regions(scales=self.scales, mode=pooling)
        self.student_needs = Needs(region_logits=(self.regions,))
        self.teacher_needs = Needs(region_logits=(self.regions,))
        self.accepts_soft_labels = base != "dkd"
        self.teacher_temperature = None if self.base_options.get("standardise") else base_temperature(base, self.base_options)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; and the share of complementary regions, both kinds' parts of the loss, and the mean loss per scale.

        loss = consistent_weight * consistent_loss + complementary_weight * complementary_loss; the means per scale lack both
        weights. With a reliability all of them are weighted by it, and its mean is reported.
        """
        teacher = teacher_of(teacher, "sdd")
        mine, theirs = student.region_logits[self.regions], teacher.region_logits[self.regions]
        losses, outside = region_losses(mine, theirs, target.labels, self.base, self.rule, self.base_options)
        trust = self.trust(theirs)
        trusted = losses if trust is None else losses * trust
        loss = _weighted(trusted, outside, self.weights, self.reduction)
        statistics = self._statistics(trusted.detach(), outside)
        return loss, statistics if trust is None else {**statistics, "reliability": trust.mean()}

    def advice(self) -> str:
        """Fewer regions."""
        return "--loss.sdd.scales '[1, 2]' has few regions"

    def _statistics(self, losses: Tensor, outside: Tensor) -> dict[str, Tensor]:
        statistics = {
            "complementary_share": outside.float().mean(),
            "consistent_loss": _reduce(losses.masked_fill(outside, 0), self.reduction),
            "complementary_loss": _reduce(losses.masked_fill(~outside, 0), self.reduction),
        }
        for scale, where in scale_slices(self.scales).items():
            statistics[f"loss_scale_{scale}"] = losses[:, where].mean()
        return statistics
