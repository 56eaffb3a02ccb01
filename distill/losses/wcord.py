"""WCoRD, reconstructed: CRD's memory under a critic without logarithms, and an optimal transport within the batch.

No code of Wasserstein contrastive representation distillation (Chen et al., CVPR 2021, arXiv 2012.08674) was ever released, and
the paper leaves much open. What follows is one reading; its numbers are not the authors'.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.inputs import check_embeddings, check_rows, check_temperature, check_weights, embedding_of, teacher_of
from distill.losses.memory_bank import MemoryBank, Mode, sample_ids_of, unit
from distill.precision import full_precision, full_precision_type, no_autocast
from distill.protocols import Criterion, DataFacts, Gathered, ModelFacts, ModelOutput, Needs, Target

EPS = 1e-7
SQUARINGS = 16


def wcord_global_loss(scores: Tensor, normaliser: Tensor | float, num_samples: int, eps: float = EPS) -> Tensor:
    """The sum of the critic over the negatives less its value at the positive: CRD's scores [B, 1 + K] -> [B].

    The critic is P / (P + K / n + eps), P = scores / normaliser. The paper's dual form asks for a 1-Lipschitz critic, hence the
    `spectral_norm` of the embeddings' layers. Reconstructed.
    """
    likelihood = scores / normaliser
    critic = likelihood / (likelihood + (scores.shape[1] - 1) / num_samples + eps)
    return critic[:, 1:].sum(1) - critic[:, 0]


def wcord_local_loss(
    student: Tensor, teacher: Tensor, entropy: float = 0.1, iterations: int = 20, through_iterations: bool = False
) -> Tensor:
    """The cost of transporting the student's rows of a batch to the teacher's, 1 - cosine for each: [B, D] x 2 -> a scalar.

    The transport pairs rows as is cheapest, not by image: a permuted copy costs next to nothing. Its gradient takes the plan as
    given unless it goes `through_iterations`. Reconstructed. Computed in float32 (float64 stays), in the log domain.
    """
    check_rows(student, teacher, "wcord", dimensions=(2,))
    with no_autocast(student):
        mine, theirs = unit(full_precision(student)), unit(full_precision(teacher))
        cost = 1 - mine @ theirs.T
        plan = sinkhorn_plan(cost if through_iterations else cost.detach(), entropy, iterations)
        return (plan * cost).sum()


def sinkhorn_plan(cost: Tensor, entropy: float, iterations: int) -> Tensor:
    """The plan with marginals 1 / B after so many rounds, rows first, from zero potentials: [B, B] -> [B, B].

    At entropy 0.1 twenty rounds leave the marginals within 0.3 percent; at 0.01 fifty are far from enough.
    """
    scaled = -cost / entropy
    share = -math.log(len(cost))
    columns = torch.zeros_like(scaled[0])
    for _ in range(iterations):
        rows = share - (scaled + columns[None, :]).logsumexp(1)
        columns = share - (scaled + rows[:, None]).logsumexp(0)
    return (scaled + rows[:, None] + columns[None, :]).exp()


def spectral_norm(weight: Tensor) -> Tensor:
    """The largest singular value of a matrix [D, C], with its gradient.

    The leading singular vector is a column of (W W^T)^65536, made by 16 squarings: no state, and nothing waits for the device,
    as a singular value decomposition does.
    """
    with torch.no_grad():
        power = weight @ weight.T
        for _ in range(SQUARINGS):
            power = power / power.norm().clamp_min(torch.finfo(power.dtype).tiny)
            power = power @ power
        leading = power.index_select(1, power.diagonal().argmax()[None]).squeeze(1)
        leading = F.normalize(leading, dim=0)
    return torch.linalg.vector_norm(weight.T @ leading)


class WCoRD(Criterion):
    """Wasserstein contrastive distillation (Chen et al., CVPR 2021), reconstructed: no code was released to compare with.

    It is the sum of a global part over `crd`'s memory and a local part within this process's batch. It is defined for the
    models that `crd` is defined for, and it costs and keeps as much. The weights 0.8 and 0.05 are those that we remember of the
    paper; they were not verified.

    Args:
        student: facts of the student, which must have an embedding.
        teacher: facts of the teacher, likewise.
        data: the number of training samples and their classes.
        global_weight: of the part over the memory.
        local_weight: of the transport within the batch.
        embedding: numbers of the common embedding.
        negatives: drawn for each image and step, of other classes.
        temperature: what cosines are divided by in the global part.
        momentum: share of a bank's row that stays when its sample is visited.
        mode: the positive; exact (the image itself) or relax (any image of its class).
        entropy: of the local transport.
        iterations: rounds of the local transport.
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
        global_weight: float = 0.8,
        local_weight: float = 0.05,
        embedding: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        mode: Mode = "exact",
        entropy: float = 0.1,
        iterations: int = 20,
    ) -> None:
        super().__init__()
        check_embeddings("wcord", student=student, teacher=teacher)
        check_temperature(temperature)
        check_weights(global_weight=global_weight, local_weight=local_weight)
        if not 0 < entropy < float("inf") or iterations < 1:
            raise ValueError(f"entropy {entropy} must be positive and finite, iterations {iterations} at least 1")
        self.global_weight, self.local_weight = global_weight, local_weight
        self.temperature, self.entropy, self.iterations = temperature, entropy, iterations
        self.memory = MemoryBank((student.embedding, teacher.embedding), data, embedding, negatives, momentum, mode)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of both parts; and both, unweighted. In training the banks move on."""
        mine, theirs = embedding_of(student), embedding_of(teacher_of(teacher, "wcord")).detach()
        sample_ids = sample_ids_of(target, "wcord")
        across, within = self.step(mine, theirs, sample_ids, self.memory.draw(sample_ids, target.generator))
        loss = self.global_weight * across + self.local_weight * within
        return loss.to(full_precision_type(mine)), {"global": across.detach(), "local": within.detach()}

    def step(self, student: Tensor, teacher: Tensor, sample_ids: Tensor, contrast_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The global and the local part, of both models' own embeddings and given contrasts."""
        with no_autocast(student):
            mine, theirs = _embed(self.memory.embed_student, student), _embed(self.memory.embed_teacher, teacher)
            sides = self.memory.contrast(mine, theirs, sample_ids, contrast_ids, self.temperature, wcord_global_loss)
            return sides.sum(), wcord_local_loss(mine, theirs, self.entropy, self.iterations)

    def traffic(self) -> tuple[Gathered, ...]:
        """Both embeddings and the mean scores, and the sample ids."""
        return self.memory.traffic()


def _embed(layer: nn.Linear, rows: Tensor) -> Tensor:
    """The layer, its weight divided by its spectral norm, then unit rows."""
    return unit(F.linear(rows.to(layer.weight.dtype), layer.weight / spectral_norm(layer.weight), layer.bias))
