"""Straightforward versions of the losses: the equations one after the other, left to autograd, nothing in place or in chunks.

What the tests check the real ones against, and what `tests.bench.losses` measures them against. Log space, as anyone
would write them who has read that the published code overflows, with PyTorch's fused operators where there are some: of the
plain ways to write each, the fastest that was found.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL per row: [..., K] x 2 -> [...]."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def _without_target(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits with the target's so low that its probability is 0."""
    target = labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    return logits.masked_fill(target, -1e9)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD) per row."""

    def target_and_rest(logits: Tensor) -> Tensor:
        rest = torch.logsumexp(_without_target(logits, labels), dim=-1)
        return torch.stack([logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1), rest], dim=-1)

    student, teacher = student / temperature, teacher / temperature
    target_class = kd(target_and_rest(student), target_and_rest(teacher), 1.0)
    other_classes = kd(_without_target(student, labels), _without_target(teacher, labels), 1.0)
    return temperature**2 * (alpha * target_class + beta * other_classes)


def nkd(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float, mask_target: bool = True) -> Tensor:
    """-p_t[y] log p_s[y] + gamma T^2 H(p_t', p_s') per row."""
    own = labels.unsqueeze(-1)
    target = -(F.softmax(teacher, -1).gather(-1, own) * F.log_softmax(student, -1).gather(-1, own)).squeeze(-1)
    if mask_target:
        student, teacher = _without_target(student, labels), _without_target(teacher, labels)
    rest = -(F.softmax(teacher / temperature, -1) * F.log_softmax(student / temperature, -1)).sum(-1)
    return target + gamma * temperature**2 * rest


def sdd(row_losses: Tensor, teacher_regions: Tensor, labels: Tensor, complementary_weight: float = 2.0) -> Tensor:
    """row_losses [B, R] and the teacher's region logits [B, R, K], weighted by the released code's rule: a scalar."""
    right = teacher_regions.argmax(-1) == labels.unsqueeze(-1)
    weights = torch.where(right != right[:, :1], complementary_weight, 1.0)
    return (weights * row_losses).mean()


def contrast(
    student: Tensor,
    teacher: Tensor,
    categories: Tensor,
    temperature: float = 1.0,
    form: str = "log",
    mask_same_category: bool = True,
) -> Tensor:
    """MSDCRD's eq. 9-12 over the whole N x N matrix of cosines: a scalar."""
    similarities = F.normalize(student, dim=1, eps=1e-6) @ F.normalize(teacher, dim=1, eps=1e-6).T / temperature
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)
    if mask_same_category:
        other_positives = (categories[:, None] == categories[None, :]) & ~own
        similarities = similarities.masked_fill(other_positives, -torch.inf)
    log_q = F.log_softmax(similarities, dim=1).diagonal()
    return -log_q.mean() if form == "log" else -log_q.exp().mean()
