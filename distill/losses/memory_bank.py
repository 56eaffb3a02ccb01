"""The memory of contrastive distillation: an embedding of every training sample by each model, of its last visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from distill.losses.contrast import SMALLEST_NORM, directed, unit_rows
from distill.losses.gathering import all_rows
from distill.protocols import DataFacts, Gathered, Target

Mode = Literal["exact", "relax"]
CHUNK_SCORES = {"cpu": 2**24}
"""Products with the whole bank that are held at once: 64 MiB in float32."""
CHUNK_SCORES_ELSEWHERE = 2**26


class Visit(NamedTuple):
    """What all ranks bring to one step, in rank order: N rows, detached."""

    sample_ids: Tensor
    """int64 [N]."""
    student: Tensor
    """[N, D], embeddings."""
    teacher: Tensor
    """[N, D]."""
    mean_scores: Tensor
    """[N, 2]: the mean over a sample's positive and negatives of exp(cosine / T), of the student's and the teacher's side."""


class MemoryBank(nn.Module):
    """Two trained linear layers to a common width D, two banks [n, D], and the draw of positives and negatives.

    Buffers: `bank_student` and `bank_teacher`, which begin as uniform noise of +-sqrt(3 / D); `normalisers` [2], a constant for
    each side, -1 until the first step sets it. All ranks change them alike, from the rows of all of them. For n = 1.28 million
    samples and D = 128 the banks are 1.3 GB on the device and in every checkpoint; an index of 31 MB is made anew.
    """

    bank_student: Tensor
    bank_teacher: Tensor
    normalisers: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    def __init__(
        self, widths: tuple[int, int], data: DataFacts, embedding: int, negatives: int, momentum: float, mode: Mode
    ) -> None:
        """widths: numbers of the student's and of the teacher's own embedding; the others as the criteria's options.

        Raises ValueError for options that cannot be right, and for data of one class, which have no negatives.
        """
        super().__init__()
        _check_options(embedding, negatives, momentum, mode)
        self.negatives, self.momentum, self.mode = negatives, momentum, mode
        self._rows = 0
        self.embed_student, self.embed_teacher = (nn.Linear(width, embedding) for width in widths)
        limit = (3 / embedding) ** 0.5
        for name in ("bank_student", "bank_teacher"):
            self.register_buffer(name, torch.empty(data.num_samples, embedding).uniform_(-limit, limit))
        self.register_buffer("normalisers", torch.full((2,), -1.0))
        # the samples class by class; of each sample, where its class begins there and how many it has
        grouped, order = data.sample_labels.sort(stable=True)
        first = torch.searchsorted(grouped, data.sample_labels)
        count = torch.searchsorted(grouped, data.sample_labels, right=True) - first
        if int(count.max()) == data.num_samples:
            raise ValueError("negatives are samples of other classes, and the training data has one class only")
        for name, index in (("order", order), ("first", first), ("count", count)):
            self.register_buffer(name, index, persistent=False)

    def draw(self, sample_ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """A positive and K negatives of each sample, as sample ids [B, 1 + K], drawn on their device.

        Negatives are uniform over the samples of other classes, with replacement. The positive is the sample itself (`exact`)
        or any of its class (`relax`).
        """
        first, count = self.first[sample_ids, None], self.count[sample_ids, None]
        positive = sample_ids[:, None]
        if self.mode == "relax":
            positive = self.order[first + _below(count, 1, generator)]
        place = _below(len(self.order) - count, self.negatives, generator)
        # the class itself is jumped over: exact, and nothing is drawn in vain
        place = torch.where(place >= first, place + count, place)
        return torch.cat([positive, self.order[place]], dim=1)

    def contrast(
        self,
        student: Tensor,
        teacher: Tensor,
        sample_ids: Tensor,
        contrast_ids: Tensor,
        temperature: float,
        row_loss: Callable[[Tensor, Tensor, int], Tensor],
    ) -> Tensor:
        """The losses of the student's and of the teacher's side, [2], of unit embeddings [B, D] and contrasts [B, 1 + K].

        `row_loss` gives the loss of each row of scores [B, 1 + K], from a normaliser and n. The order: 1. scores against the
        other model's bank; 2. the rows of all ranks, which set the normalisers in the first step; 3. losses and their
        gradients; 4. in training, the banks.
        """
        self._rows = len(student)
        both = ((student, self.bank_teacher), (teacher, self.bank_student))
        scores = [crd_scores(own, bank, contrast_ids, temperature) for own, bank in both]
        visit = self._visit(sample_ids, student, teacher, scores)
        losses = [
            settled(row_loss(each, normaliser, len(self.order)).mean(), own)
            for (own, _), each, normaliser in zip(both, scores, self.normalisers.clone(), strict=True)
        ]
        if self.training and torch.is_grad_enabled():
            self.update(visit)
        return torch.stack(losses)

    def traffic(self) -> tuple[Gathered, ...]:
        """What the last step gathered, if there was one: both embeddings with their mean scores, and the sample ids."""
        gathered = (Gathered(self._rows, 2 * self.bank_student.shape[1] + 2, True), Gathered(self._rows, 1, True))
        return gathered if self._rows else ()

    @torch.no_grad()
    def _visit(self, sample_ids: Tensor, student: Tensor, teacher: Tensor, scores: Sequence[Tensor]) -> Visit:
        """The rows of all ranks; their mean scores set the normalisers where no step has yet.

        A normaliser is the mean score times n. Rows that are not finite do not count. Nothing waits for the device.
        """
        means = [each.mean(1, keepdim=True) for each in scores]
        rows = all_rows(torch.cat([student, teacher, *means], dim=1))
        parts = rows.split([student.shape[1], teacher.shape[1], 2], dim=1)
        usable = parts[2].isfinite().all(1, keepdim=True)
        found = torch.where(usable, parts[2], 0).sum(0) / usable.sum() * len(self.order)
        unset = (self.normalisers < 0) & found.isfinite()
        self.normalisers.copy_(torch.where(unset, found, self.normalisers))
        return Visit(all_rows(sample_ids), *parts)

    @torch.no_grad()
    def update(self, visit: Visit) -> None:
        """Moves the banks' rows of the visited samples towards their embeddings.

        A sample whose new row would not be finite, in either bank, keeps its old ones; of a sample that comes twice the last
        visit counts. Rows of the same sample write the same numbers, so the order of writing does not matter on a GPU.
        """
        ids = visit.sample_ids
        pairs = ((self.bank_student, visit.student), (self.bank_teacher, visit.teacher))
        new = [updated_rows(bank[ids], embeddings, self.momentum) for bank, embeddings in pairs]
        usable = torch.cat(new, dim=1).isfinite().all(1)
        same = (ids[:, None] == ids[None, :]) & usable[None, :]
        last = torch.where(same, torch.arange(len(ids), device=ids.device)[None, :], -1).amax(1)
        for (bank, _), rows in zip(pairs, new, strict=True):
            bank[ids] = torch.where(last[:, None] >= 0, rows[last], bank[ids])


def crd_scores(embeddings: Tensor, bank: Tensor, ids: Tensor, temperature: float = 0.07) -> Tensor:
    """exp(e_i . bank[ids_ik] / T) of unit rows: [B, D], [n, D], [B, 1 + K] -> [B, 1 + K].

    One product with the whole bank, some rows at a time, of which the ids are taken: 21 times as fast on a CPU as gathering
    B (1 + K) rows of the bank first (1.1 GB at B 64), and the same bits.
    """
    rows = max(1, CHUNK_SCORES.get(bank.device.type, CHUNK_SCORES_ELSEWHERE) // len(bank))
    parts = [(some @ bank.T).gather(1, chosen) for some, chosen in zip(embeddings.split(rows), ids.split(rows), strict=True)]
    return (torch.cat(parts) / temperature).exp()


def unit(embeddings: Tensor) -> Tensor:
    """Rows of norm 1; one shorter than 1e-6 stays short and gets no gradient, where the reference divides 0 by 0."""
    return unit_rows(directed(embeddings))


def updated_rows(rows: Tensor, embeddings: Tensor, momentum: float) -> Tensor:
    """momentum x rows + (1 - momentum) x embeddings, of norm 1: [B, D] x 2 -> [B, D]; NaN where that is shorter than 1e-6."""
    moved = momentum * rows + (1 - momentum) * embeddings
    norms = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return moved / torch.where(norms > SMALLEST_NORM, norms, torch.nan)


def settled(loss: Tensor, *inputs: Tensor) -> Tensor:
    """The loss with its gradient to `inputs` made at once, so that what else its graph reads may change afterwards."""
    if not loss.requires_grad:
        return loss
    gradients = torch.autograd.grad(loss, inputs)
    # adds 0, with this gradient
    return loss.detach() + sum(((each - each.detach()) * slope).sum() for each, slope in zip(inputs, gradients, strict=True))


def sample_ids_of(target: Target, loss: str) -> Tensor:
    """The target's sample ids; raises ValueError where there are none."""
    if target.sample_ids is None:
        raise ValueError(f"{loss} remembers every training sample and got none by name; give Target(sample_ids=...)")
    return target.sample_ids


def _below(limits: Tensor, columns: int, generator: torch.Generator | None) -> Tensor:
    """Uniform integers from 0 to below each row's limit: [B, 1] -> [B, columns]."""
    # of 2^62 values the remainder makes the first ones likelier by a share of limit / 2^62
    drawn = torch.randint(2**62, (len(limits), columns), generator=generator, device=limits.device)
    return drawn % limits


def _check_options(embedding: int, negatives: int, momentum: float, mode: str) -> None:
    for name, number in (("embedding", embedding), ("negatives", negatives)):
        if number < 1:
            raise ValueError(f"{name} {number} must be at least 1")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum {momentum} must lie in 0..1")
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")
