"""Contrastive representation distillation (CRD): an image's embeddings by both models agree, and differ from other classes'."""

from __future__ import annotations

from torch import Tensor

from distill.losses.inputs import check_embeddings, check_temperature, embedding_of, teacher_of
from distill.losses.memory_bank import MemoryBank, Mode, sample_ids_of, unit
from distill.precision import full_precision_type, no_autocast
from distill.protocols import Criterion, DataFacts, Gathered, ModelFacts, ModelOutput, Needs, Target

EPS = 1e-7


def crd_row_loss(scores: Tensor, normaliser: Tensor | float, num_samples: int, eps: float = EPS) -> Tensor:
    """-log(P_0 / (P_0 + m + eps)) - sum over k of log(m / (P_k + m + eps)): [B, 1 + K] -> [B].

    P = scores / normaliser, the positive in column 0, and m = K / n. Source: Tian et al., ICLR 2020, eq. 17-19; RepDistiller
    b84f547, `ContrastLoss`. The paper has no normaliser and no eps.
    """
    likelihood = scores / normaliser
    share = (scores.shape[1] - 1) / num_samples
    positive, negatives = likelihood[:, 0], likelihood[:, 1:]
    # (share + eps) first, as the reference: quotients next to 1 round alike in float32, which is 8e-5 of the value (not of the
    # gradient) at n 50000, K 16384. log1p would be exact, and another number than the published code's.
    return -(positive / (positive + (share + eps))).log() - (share / (negatives + (share + eps))).log().sum(1)


class CRD(Criterion):
    """Contrastive representation distillation (Tian et al., ICLR 2020), with RepDistiller's memory; the papers' weight is 0.8.

    Defined for every pair of models with a last linear layer, of any widths, and for data of at least two classes, one class an
    image. Each side's loss compares its embeddings with the other model's bank, that is with earlier visits. The banks hold no
    step's own embeddings when it reads them.

    Where we differ: negatives are drawn on the device, with replacement (there: by the loader's workers, without on CIFAR); a
    row that would not be finite never gets into a bank; an embedding of length 0 gets no gradient; the banks are equal on all
    ranks, so that the mean over ranks is the loss of the joined batch (there, on several GPUs, all updates but the first's are
    lost).

    Cost of a step: 4 B n D operations for the scores and as many for their gradient; at n = 1.28 million, D 128 and B 256,
    2.7e11 in all. Memory: 2 n D numbers (1.3 GB there), 256 MiB of products at a time, and 3 B K numbers. Each step gathers 2 D
    + 3 numbers an image. Checkpoints hold the banks: a resumed run goes on as if it had not stopped.

    Args:
        student: facts of the student, which must have an embedding.
        teacher: facts of the teacher, likewise.
        data: the number of training samples and their classes.
        embedding: numbers of the common embedding.
        negatives: drawn for each image and step, of other classes.
        temperature: what cosines are divided by.
        momentum: share of a bank's row that stays when its sample is visited.
        mode: the positive; exact (the image itself) or relax (any image of its class).
    """

    student_needs = Needs(embedding=True)
    teacher_needs = Needs(embedding=True)
    accepts_soft_labels = False

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        data: DataFacts,
        *,
        embedding: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        mode: Mode = "exact",
    ) -> None:
        super().__init__()
        check_embeddings("crd", student=student, teacher=teacher)
        check_temperature(temperature)
        self.temperature = temperature
        self.memory = MemoryBank((student.embedding, teacher.embedding), data, embedding, negatives, momentum, mode)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of both sides' means over images; and each side's. In training the banks move on.

        Raises ValueError without the target's sample ids.
        """
        mine, theirs = embedding_of(student), embedding_of(teacher_of(teacher, "crd")).detach()
        sample_ids = sample_ids_of(target, "crd")
        losses = self.step(mine, theirs, sample_ids, self.memory.draw(sample_ids, target.generator))
        return losses.sum().to(full_precision_type(mine)), {"student": losses[0].detach(), "teacher": losses[1].detach()}

    def step(self, student: Tensor, teacher: Tensor, sample_ids: Tensor, contrast_ids: Tensor) -> Tensor:
        """The losses of the student's and the teacher's side, [2], of both models' own embeddings and given contrasts."""
        memory, dtype = self.memory, self.memory.bank_student.dtype
        with no_autocast(student):
            mine, theirs = unit(memory.embed_student(student.to(dtype))), unit(memory.embed_teacher(teacher.to(dtype)))
            return memory.contrast(mine, theirs, sample_ids, contrast_ids, self.temperature, crd_row_loss)

    def advice(self) -> str:
        """Narrower embeddings."""
        return "--loss.crd.embedding 64 halves the banks and the products with them"

    def traffic(self) -> tuple[Gathered, ...]:
        """Both embeddings and the mean scores, and the sample ids."""
        return self.memory.traffic()
