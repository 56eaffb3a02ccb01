"""Probabilistic knowledge transfer (PKT): each image's distribution of likeness over the batch follows the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.contrast import directed
from distill.losses.gathering import joined_batch
from distill.losses.inputs import check_embeddings, check_rows, embedding_of, teacher_of
from distill.precision import double_precision, full_precision_type, no_autocast
from distill.protocols import Criterion, Gathered, ModelFacts, ModelOutput, Needs, Target

EPS = 1e-7


def pkt_loss(student: Tensor, teacher: Tensor, eps: float = EPS) -> Tensor:
    """The mean over j of P_t,ij log((P_t,ij + eps) / (P_s,ij + eps)) for each image i: [B, D_s] and [B, D_t] -> [B].

    P_ij is (1 + cosine of rows i and j) / 2 divided by its sum over j, the image itself included; a cosine's norms are |x| +
    eps. The mean makes it the KL divergence / B, which the papers' weight of 30000 makes up for; eps makes it no exact
    divergence: about -1e-16 is possible. Source: Passalis and Tefas, ECCV 2018; their code a58fd1b, mdistiller's and
    RepDistiller's agree. Where we differ: a student row shorter than 1e-6 gets no gradient (there: NaN for a row of zeros).
    Computed in float64, for the logarithms of nearly equal numbers cancel; the result is float32 (or float64). No gradient to
    the teacher. One image: 0.
    """
    check_rows(student, teacher, "pkt", dimensions=(2,))
    with no_autocast(student):
        mine, theirs = _likeness(student, eps), _likeness(teacher.detach(), eps)
        losses = (theirs * ((theirs + eps) / (mine + eps)).log()).mean(1)
    return losses.to(full_precision_type(student))


def _likeness(rows: Tensor, eps: float) -> Tensor:
    """[B, D] -> [B, B], rows that sum to 1."""
    rows = directed(double_precision(rows))
    unit = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + eps)
    likeness = (1 + unit @ unit.T) / 2
    return likeness / likeness.sum(1, keepdim=True)


class PKT(Criterion):
    """Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018) on what the last linear layers read.

    Defined for every pair of models with a last linear layer, of any widths. The papers' weight is 30000.

    Args:
        student: facts of the student, which must have an embedding.
        teacher: facts of the teacher, likewise.
        gather: compare with the images of all processes.
    """

    student_needs = Needs(embedding=True)
    teacher_needs = Needs(embedding=True)

    def __init__(self, student: ModelFacts, teacher: ModelFacts, *, gather: bool = False) -> None:
        super().__init__()
        check_embeddings("pkt", student=student, teacher=teacher)
        self.gather = gather
        self._traffic: tuple[Gathered, ...] = ()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over images, of this process or of all."""
        mine, theirs = embedding_of(student), embedding_of(teacher_of(teacher, "pkt"))
        self._traffic = tuple(Gathered(len(each), each.shape[1], self.gather) for each in (mine, theirs))
        if self.gather:
            mine, theirs = joined_batch(mine), joined_batch(theirs.detach())
        return pkt_loss(mine, theirs).mean(), {}

    def traffic(self) -> tuple[Gathered, ...]:
        """Both models' embeddings."""
        return self._traffic
