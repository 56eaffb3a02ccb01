"""A loss that no paper has: it reads all that a step can tell a criterion, and keeps a memory bank. For tests only.

A run takes it by `--import` of this file and `--loss.everything.weight W`. It raises where something is not as the protocol
promises, which ends the run.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses import LOSSES
from distill.losses.contrast import gather_columns
from distill.protocols import Criterion, DataFacts, ModelFacts, ModelOutput, Needs, Target

NEEDS = Needs(stages=(-1,), preactivations=(-1,), blocks=(0, -1), embedding=True, head_bias=True)


class Everything(Criterion):
    """Distance of projected embeddings from the teacher's and from what the bank remembers of them, with noise.

    Args:
        student: facts of the student.
        teacher: facts of the teacher.
        data: facts of the training split.
        momentum: how slowly the bank changes.
    """

    student_needs = teacher_needs = NEEDS
    accepts_soft_labels = False
    no_weight_decay = frozenset({"scale"})

    def __init__(self, student: ModelFacts, teacher: ModelFacts, data: DataFacts, *, momentum: float = 0.5) -> None:
        super().__init__()
        self.facts, self.data, self.momentum = (student, teacher), data, momentum
        self.project = nn.Linear(student.embedding, teacher.embedding)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("bank", torch.zeros(data.num_samples, teacher.embedding))
        self.register_buffer("visits", torch.zeros(data.num_samples, dtype=torch.int64))
        self.register_buffer("rank", torch.tensor(-1), persistent=False)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels int [B]."""
        assert teacher is not None
        assert target.sample_ids is not None
        assert target.generator is not None
        for output, facts in zip((student, teacher), self.facts, strict=True):
            check_output(output, facts)
        self._check_ids(target.sample_ids, target.labels)
        self._check_rank()
        remembered = self.bank[target.sample_ids].clone()
        mine = self.project(student.embedding.float())
        noise = torch.rand(len(mine), 1, generator=target.generator)
        share = target.progress.step / target.progress.total_steps
        apart = (mine - teacher.embedding.detach()).square() + share * (mine - remembered).square()
        maps = sum(block.float().square().mean() for block in student.blocks.values())
        maps = maps + F.relu(student.preactivations[-1].float()).mean() + student.head_bias.float().square().mean()
        self._remember(teacher.embedding.detach().float(), target.sample_ids)
        return self.scale * (noise * apart).mean() + 1e-3 * maps, {"seen": self.visits.float().sum()}

    def _check_ids(self, ids: Tensor, labels: Tensor) -> None:
        assert len(ids) == self.data.micro_batch
        assert torch.equal(self.data.sample_labels[ids], labels), "the ids are those of other images"

    def _check_rank(self) -> None:
        """DDP sent nobody's buffers: each rank still has its own."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        assert int(self.rank) in (-1, rank), f"rank {rank} has the buffers of rank {int(self.rank)}"
        self.rank.fill_(rank)

    @torch.no_grad()
    def _remember(self, embedding: Tensor, ids: Tensor) -> None:
        """The bank changes alike on every rank: by the rows of all of them, and by finite ones only."""
        rows, ids, _ = gather_columns(embedding, ids)
        sound = rows.isfinite().all(1)
        rows, ids = rows[sound], ids[sound]
        self.bank[ids] = self.momentum * self.bank[ids] + (1 - self.momentum) * rows
        self.visits[ids] += 1


def check_output(output: ModelOutput, facts: ModelFacts) -> None:
    """The output is what was asked for, of the shapes that the facts promised."""
    assert output.embedding.shape[1] == facts.embedding
    assert output.head_bias.shape == (facts.num_classes,)
    assert output.stages[-1].shape[1:] == output.preactivations[-1].shape[1:] == facts.stages[-1]
    assert set(output.blocks) == {0, -1}
    assert all(block.shape[1:] == facts.blocks[index] for index, block in output.blocks.items())


LOSSES["everything"] = Everything
