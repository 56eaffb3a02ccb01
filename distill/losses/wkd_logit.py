"""WKD-L: the cheapest transport from the student's to the teacher's probabilities of the classes that are not the label."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.losses.divergence import LEFT_OUT
from distill.losses.inputs import check_classes, check_pair, check_temperature, check_weights, soft_labels, teacher_of
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Target

FLOOR = 1e-8
"""Added to costs and to what scalings are divided by: it bounds these where no mass arrives, and belongs to the method."""
CLASSIFIER = "classifier"
"""Says that distances between classes are those of the teacher's classifier."""


def wkd_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    cost: Tensor,
    temperature: float = 2.0,
    entropy: float = 0.05,
    iterations: int = 10,
) -> Tensor:
    """The transport cost of each row: logits [B, K], labels int [B] or soft [B, K], cost [K, K] of `transport_cost` -> [B].

    Both softmaxes, at temperature T, leave the label out (of soft labels the largest). The plan is made by so many rounds of
    Sinkhorn's algorithm at entropy eps, the student's marginal last; the value is its cost, without the entropy; the gradient
    passes through all rounds. No factor T^2. Source: Lv et al., NeurIPS 2024; JiamingLv/WKD 214cf88, whose loss is the batch
    mean of this and `nkd` with gamma 0 beside it. The same numbers by another way: one kernel for the batch, with 0 at each
    row's label, instead of B of size (K - 1)^2 (4 GB at B 256, K 1000); 40 products of [B, K] with [K, K] instead. Not a
    divergence: positive, with a gradient, also where both agree; ten rounds do not converge, and belong to the method. Computed
    in float32 (float64 stays), in which the floor of 1e-8 needs it. No gradient to the teacher. Raises ValueError for fewer
    than three classes: the transport among one class costs nothing.
    """
    check_pair(student_logits, teacher_logits, "wkd_logit", dimensions=2)
    check_temperature(temperature)
    if soft_labels(labels, student_logits):
        labels = labels.argmax(-1)
    _check_classes(student_logits.shape[1], cost)
    with no_autocast(student_logits):
        mine, theirs = (
            (full_precision(logits) / temperature).scatter(1, labels.long()[:, None], LEFT_OUT).softmax(1)
            for logits in (student_logits, teacher_logits.detach())
        )
        cost = cost.to(mine) + FLOOR
        rows, columns, kernel = sinkhorn(mine, theirs, cost, labels, entropy, iterations)
        return (rows * (columns @ (kernel * cost).T)).sum(1)


def sinkhorn(
    student: Tensor, teacher: Tensor, cost: Tensor, labels: Tensor, entropy: float, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The scalings u, v [B, K] and the kernel G [K, K] of the plan u_i G_ij v_j of each row; 0 at its label throughout.

    At first u is 1 / (K - 1) and 0 at the label; there b = 0 makes v = 0 and a = 0 makes u = 0 in every round, so that the
    label's row and column add exactly 0 to every product.
    """
    kernel = (-cost / entropy).exp()
    rows = torch.full_like(student, 1 / (student.shape[1] - 1)).scatter(1, labels.long()[:, None], 0.0)
    columns = torch.zeros_like(rows)
    for _ in range(iterations):
        columns = teacher / (rows @ kernel + FLOOR)
        rows = student / (columns @ kernel.T + FLOOR)
    return rows, columns, kernel


def transport_cost(distances: Tensor, sharpening: float = 1.0) -> Tensor:
    """1 - exp(-sharpening x distance), or the distance itself at sharpening 0, not below 0: [K, K] -> [K, K]."""
    sharpened = 1 - (-sharpening * distances).exp() if sharpening > 0 else distances
    return sharpened.relu()


def cka_distances(class_features: Tensor) -> Tensor:
    """1 - CKA of the features of m images of each class, [K, m, F] -> [K, K], float64.

    Columns are centred class by class; CKA = |X_j^T X_i|^2 / (|X_i^T X_i| |X_j^T X_j|), Frobenius norms. It pairs image k of
    one class with image k of the other, which is arbitrary. The released ImageNet matrices are of logits, those of CIFAR of
    every cell of the last map.
    """
    centred = class_features.double() - class_features.double().mean(1, keepdim=True)
    # |X_j^T X_i|^2 is the product of the m x m Gram matrices
    grams = (centred @ centred.transpose(1, 2)).flatten(1)
    products = grams @ grams.T
    lengths = products.diagonal().sqrt()
    return 1 - products / (lengths[:, None] * lengths[None, :])


def classifier_distances(weight: Tensor) -> Tensor:
    """1 - cosine of the rows of a classifier, [K, D] -> [K, K], float64."""
    unit = torch.nn.functional.normalize(weight.detach().double(), dim=1)
    return 1 - unit @ unit.T


def _check_classes(classes: int, cost: Tensor) -> None:
    if classes < 3:
        raise ValueError(
            f"wkd_logit moves mass among the classes beside the label and got {classes} classes; it needs at least 3"
        )
    if cost.shape != (classes, classes):
        raise ValueError(
            f"distances of the classes are {list(cost.shape)}; of {classes} classes they must be [{classes}, {classes}]"
        )


class WKDLogit(Criterion):
    """WKD-L (Lv et al., NeurIPS 2024), without its target part, which is `nkd` with `gamma: 0`, of weight 1 there.

    Defined for every pair with the same three or more classes. The released runs: weight 30 for ResNet-34 -> ResNet-18, 25 with
    sharpening 2 for ResNet-50 -> MobileNetV1, constant from the start or until `decay_start_epoch` and then to `final_weight:
    0` by `decay: cosine`. Without `distances` all classes are equally far from each other, which on ImageNet differs from the
    released matrices by 1.3 percent: the control that a gain of class relations has to beat. `classifier` needs no file and
    takes the teacher's own relations; no released run uses it, so its weight and sharpening are yours to find.

    Args:
        student: facts of the student; only the number of its classes is looked at.
        teacher: facts of the teacher, likewise; and its classifier, where distances come from that.
        distances: between classes. None: all are 1. `classifier`: 1 - cosine of the rows of the teacher's last linear layer.
            Anything else: a safetensors file with `distance`, float [K, K] in the order of the data's classes, as of
            `cka_distances`.
        temperature: of both softmaxes; 2 on ImageNet, 6 to 8 on CIFAR-100.
        entropy: of the transport; the released key `SINKHORN.LAMBDA`.
        iterations: rounds of Sinkhorn's algorithm.
        sharpening: of the distances; 0 takes them as they are.
    """

    student_needs = teacher_needs = Needs(logits=True)
    cost: Tensor

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        distances: str | None = None,
        temperature: float = 2.0,
        entropy: float = 0.05,
        iterations: int = 10,
        sharpening: float = 1.0,
    ) -> None:
        super().__init__()
        check_classes(student, teacher, "wkd_logit")
        check_temperature(temperature)
        check_weights(sharpening=sharpening)
        if not 0 < entropy < float("inf"):
            raise ValueError(f"entropy {entropy} must be positive and finite")
        if iterations < 1:
            raise ValueError(f"iterations {iterations} must be at least 1")
        self.loss = partial(wkd_logit_loss, temperature=temperature, entropy=entropy, iterations=iterations)
        cost = transport_cost(class_distances(distances, teacher), sharpening)
        _check_classes(student.num_classes, cost)
        # the file or the teacher makes it anew: no state
        self.register_buffer("cost", cost.float(), persistent=False)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B], or float [B, K] of which the largest class counts."""
        teacher = teacher_of(teacher, "wkd_logit")
        return self.loss(student.logits, teacher.logits, target.labels, self.cost).mean(), {}


def class_distances(source: str | None, teacher: ModelFacts) -> Tensor:
    """The distances that `source` says, [K, K]: 1 between any two classes for None, those of the teacher's classifier for
    `classifier`, those of a file for its path. ValueError where the teacher or the file has none.
    """
    if source is None:
        return 1 - torch.eye(teacher.num_classes, dtype=torch.float64)
    if source == CLASSIFIER:
        if teacher.classifier is None:
            raise ValueError(
                "distances 'classifier' needs a teacher whose logits come from one linear layer, and this one has none; "
                "give a file, or leave distances out"
            )
        return classifier_distances(teacher.classifier)
    if not Path(source).is_file():
        raise ValueError(f"distances {source!r} is no file; say classifier, make a file of cka_distances, or leave it out")
    tensors = load_file(source)
    if "distance" not in tensors or not tensors["distance"].isfinite().all():
        raise ValueError(f"distances {source!r} holds {sorted(tensors)}; it must hold `distance`, finite numbers [K, K]")
    return tensors["distance"]
