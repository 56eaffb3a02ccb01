"""Straightforward versions of the losses: the equations one after the other, left to autograd, nothing in place or in chunks.

What the tests check the real ones against, and what `tests.bench.losses` measures them against. Log space, as anyone
would write them who has read that the published code overflows, with PyTorch's fused operators where there are some: of the
plain ways to write each, the fastest that was found.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
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


def at(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Attention transfer of maps of one grid: a scalar."""
    mine, theirs = (F.normalize(each.square().mean(1).flatten(1), dim=1) for each in (student_map, teacher_map))
    return (mine - theirs).square().mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarities of the flattened rows of a batch: a scalar."""
    mine, theirs = (F.normalize(each.flatten(1) @ each.flatten(1).T, dim=1) for each in (student, teacher))
    return (mine - theirs).square().mean()


def nst(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Neuron selectivity of maps of one grid, by the products of every two channels at every cell, as released: a scalar."""

    def kernel(first: Tensor, second: Tensor) -> Tensor:
        return (first[:, None] * second[:, :, None]).sum(-1).square().mean()

    mine, theirs = (F.normalize(each.flatten(2), dim=2) for each in (student_map, teacher_map))
    return kernel(theirs, theirs) + kernel(mine, mine) - 2 * kernel(mine, theirs)


def fsp(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The difference of two maps' channel products with themselves, at every cell, as released: a scalar."""
    mine, theirs = ((each.flatten(2)[:, None] * each.flatten(2)[:, :, None]).mean(-1) for each in (student_map, teacher_map))
    return (mine - theirs).square().mean()


def pkt(student: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """The authors' formula: a scalar."""

    def likeness(rows: Tensor) -> Tensor:
        unit = rows / (rows.square().sum(1, keepdim=True).sqrt() + eps)
        cosines = (unit @ unit.T + 1) / 2
        return cosines / cosines.sum(1, keepdim=True)

    mine, theirs = likeness(student), likeness(teacher)
    return (theirs * ((theirs + eps) / (mine + eps)).log()).mean()


def rkd(student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Distances by products, angles by the differences of all pairs [B, B, D], as released: a scalar."""

    def distances(rows: Tensor) -> Tensor:
        squares = rows.square().sum(1)
        found = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp(min=1e-12).sqrt()
        found = found * (1 - torch.eye(len(rows), device=rows.device))
        return found / found[found > 0].mean()

    def angles(rows: Tensor) -> Tensor:
        directions = F.normalize(rows[None] - rows[:, None], dim=2)
        return torch.bmm(directions, directions.transpose(1, 2))

    distance = F.smooth_l1_loss(distances(student), distances(teacher))
    return distance_weight * distance + angle_weight * F.smooth_l1_loss(angles(student), angles(teacher))


def dist(student: Tensor, teacher: Tensor, eps: float = 1e-8) -> Tensor:
    """Correlations of rows and of columns at temperature 1: a scalar."""

    def correlation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)).mean()

    mine, theirs = student.softmax(1), teacher.softmax(1)
    return (1 - correlation(mine, theirs)) + (1 - correlation(mine.T, theirs.T))


def wkd_logit(
    student: Tensor, teacher: Tensor, labels: Tensor, cost: Tensor, entropy: float = 0.05, rounds: int = 10
) -> Tensor:
    """Transport at temperature 2 with a kernel for each image, [B, K - 1, K - 1], as released: a scalar."""
    images, classes = student.shape
    others = torch.arange(classes, device=labels.device)[None] != labels[:, None]
    mine, theirs = ((each[others].view(images, -1) / 2).softmax(1) for each in (student, teacher))
    both = others[:, :, None] & others[:, None, :]
    costs = cost.expand(images, -1, -1)[both].view(images, classes - 1, classes - 1) + 1e-8
    kernel = (-costs / entropy).exp()
    u = torch.full_like(mine, 1 / (classes - 1))
    for _ in range(rounds):
        v = theirs / (torch.einsum("bij,bi->bj", kernel, u) + 1e-8)
        u = mine / (torch.einsum("bij,bj->bi", kernel, v) + 1e-8)
    return (u[:, :, None] * kernel * v[:, None, :] * costs).sum((1, 2)).mean()


def wkd_feature(student_map: Tensor, teacher_map: Tensor, grid: int = 4, eps: float = 1e-5) -> Tensor:
    """Twice the means' part and the deviations', cell by cell: a scalar."""
    height, width = student_map.shape[-2:]
    total = student_map.new_zeros(())
    for i in range(grid):
        for j in range(grid):
            top, bottom = i * height // grid, -(-(i + 1) * height // grid)
            left, right = j * width // grid, -(-(j + 1) * width // grid)
            mine, theirs = (each[:, :, top:bottom, left:right].flatten(2) for each in (student_map, teacher_map))
            deviations = ((mine.var(2) + eps).sqrt() - (theirs.var(2) + eps).sqrt()).square().sum(1)
            total = total + (2 * (mine.mean(2) - theirs.mean(2)).square().sum(1) + deviations).mean() / grid**2
    return total


def hierarchical(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """ReviewKD's comparison of one level, both maps averaged, as released: a scalar."""
    total, weight, weights = F.mse_loss(student_map, teacher_map), 1.0, 1.0
    for level in (4, 2, 1):
        if level < student_map.shape[2]:
            weight /= 2
            weights += weight
            mine, theirs = (F.adaptive_avg_pool2d(each, level) for each in (student_map, teacher_map))
            total = total + weight * F.mse_loss(mine, theirs)
    return total / weights


def memory_scores(embeddings: Tensor, bank: Tensor, ids: Tensor, temperature: float = 0.07) -> Tensor:
    """CRD's scores of gathered rows of the bank, [B, 1 + K, D], as released: [B, 1 + K]."""
    return (torch.bmm(bank[ids], embeddings[:, :, None]).squeeze(2) / temperature).exp()
