"""SRRL: softmax regression representation learning (Yang et al., ICLR 2021): the teacher's classifier judges the student's
features."""

from __future__ import annotations

from torch import Tensor, nn

from distill.losses.inputs import check_embeddings, check_pair, embedding_of, teacher_of
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Target


def srrl_loss(predicted: Tensor, teacher: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squares of p - t and of W (p - t) for each image: [B, D] x 2, [K, D] -> [B] x 2; the loss is their sum.

    p is the student's embedding in the teacher's space and t the teacher's; W p + b are the logits that the teacher's last
    layer makes of p, whose bias cancels. Source: Yang et al., eq. 2 and 5; DefangChen/SimKD 2b389c3, `srrl`, whose scalar is
    the batch mean of the sum. Computed in float32 (float64 stays); no gradient to the teacher. Raises ValueError for shapes
    that differ.
    """
    check_pair(predicted, teacher, "srrl", dimensions=2)
    with no_autocast(predicted):
        apart = full_precision(predicted) - full_precision(teacher.detach())
        return apart.square().mean(1), (apart @ full_precision(classifier).T).square().mean(1)


class SRRL(Criterion):
    """Softmax regression representation learning (SRRL; Yang et al., ICLR 2021): the batch mean of `srrl_loss`.

    A linear layer without bias, BN and ReLU bring the student's embedding to the teacher's, as in SimKD's repository, whose
    numbers are the published ones; the authors project the last map and pool behind it. Embeddings of a teacher that have
    negative entries cannot be reached behind the ReLU. Weight 1, with KD 1 and cross-entropy 1 beside it on CIFAR-100.

    Args:
        student: facts of the student: what its last linear layer reads.
        teacher: facts of the teacher: the same, and that layer's weight.
        relu: end the projection with a ReLU, as released.
    """

    student_needs = teacher_needs = Needs(embedding=True)

    classifier: Tensor

    def __init__(self, student: ModelFacts, teacher: ModelFacts, *, relu: bool = True) -> None:
        super().__init__()
        check_embeddings("srrl", student=student, teacher=teacher)
        if teacher.classifier is None:
            raise ValueError("srrl asks the teacher's classifier, and this one has none; take a teacher with a classifier")
        layer = nn.Linear(student.embedding, teacher.embedding, bias=False)
        self.project = nn.Sequential(layer, nn.BatchNorm1d(teacher.embedding), nn.ReLU() if relu else nn.Identity())
        # a fact of the teacher, made again for every run: no state
        self.register_buffer("classifier", teacher.classifier.clone(), persistent=False)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both batch means; and each of them."""
        theirs = embedding_of(teacher_of(teacher, "srrl"))
        features, logits = (each.mean() for each in srrl_loss(self.project(embedding_of(student)), theirs, self.classifier))
        return features + logits, {"features": features.detach(), "logits": logits.detach()}
