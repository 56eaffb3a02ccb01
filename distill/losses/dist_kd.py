"""DIST: the student's predictions correlate with the teacher's, image by image and class by class."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.gathering import joined_batch
from distill.losses.inputs import check_classes, check_pair, check_temperature, check_weights, teacher_of
from distill.precision import double_precision, full_precision_type, no_autocast
from distill.protocols import Criterion, Gathered, ModelFacts, ModelOutput, Needs, Target

EPS = 1e-8


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = EPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """T^2 (beta inter + gamma intra), inter and intra: [B, K] x 2 -> three scalars.

    p = softmax(z / T); inter is 1 less the mean over images of the correlation of both models' rows of p, intra the same of the
    columns, over the batch. A correlation is <a - mean, b - mean> / (|a - mean| |b - mean| + eps); eps is part of the method,
    for the columns of many classes are tiny. Source: Huang et al., NeurIPS 2022, eq. 6-10; hunto/image_classification_sota
    6f7a70a, whose T^2 the paper lacks. Equal logits do not give exactly 0, one image gives intra 1 without a gradient. Computed
    in float64: the products of small columns round to 0 in half precision. The results are float32 (or float64). No gradient to
    the teacher.
    """
    check_pair(student_logits, teacher_logits, "dist", dimensions=2)
    check_temperature(temperature)
    with no_autocast(student_logits):
        mine, theirs = (
            (double_precision(logits) / temperature).softmax(1) for logits in (student_logits, teacher_logits.detach())
        )
        inter, intra = 1 - _correlation(mine, theirs, 1, eps).mean(), 1 - _correlation(mine, theirs, 0, eps).mean()
        total = temperature**2 * (beta * inter + gamma * intra)
    wanted = full_precision_type(student_logits)
    return total.to(wanted), inter.to(wanted), intra.to(wanted)


def _correlation(student: Tensor, teacher: Tensor, dim: int, eps: float) -> Tensor:
    """Pearson's correlation along a dimension."""
    mine, theirs = student - student.mean(dim, keepdim=True), teacher - teacher.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(mine, dim=dim) * torch.linalg.vector_norm(theirs, dim=dim)
    return (mine * theirs).sum(dim) / (norms + eps)


class Dist(Criterion):
    """DIST (Huang et al., NeurIPS 2022): correlations instead of a divergence, for strong teachers.

    Defined for every pair with the same classes. The paper's weight is 2, beside cross-entropy of weight 1.

    Args:
        student: facts of the student; only the number of its classes is looked at.
        teacher: facts of the teacher, likewise.
        beta: weight of the correlation over classes, image by image.
        gamma: weight of the correlation over images, class by class.
        temperature: what both models' logits are divided by; 1 on ImageNet, 4 on CIFAR-100; the loss is multiplied by its
            square.
        gather: correlate over the images of all processes.
    """

    student_needs = teacher_needs = Needs(logits=True)

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_classes(student, teacher, "dist")
        check_temperature(temperature)
        check_weights(beta=beta, gamma=gamma)
        self.options = {"beta": beta, "gamma": gamma, "temperature": temperature}
        self.gather = gather
        self._traffic: tuple[Gathered, ...] = ()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over the images of this process or of all; and both parts, unweighted. The labels are not read."""
        mine, theirs = student.logits, teacher_of(teacher, "dist").logits
        self._traffic = tuple(Gathered(len(each), each.shape[1], self.gather) for each in (mine, theirs))
        if self.gather:
            mine, theirs = joined_batch(mine), joined_batch(theirs.detach())
        total, inter, intra = dist_loss(mine, theirs, **self.options)
        return total, {"inter": inter.detach(), "intra": intra.detach()}

    def traffic(self) -> tuple[Gathered, ...]:
        """Both models' logits."""
        return self._traffic
