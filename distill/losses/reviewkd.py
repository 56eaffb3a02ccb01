"""ReviewKD: knowledge review (Chen et al., CVPR 2021).

Deep levels of the student are fused, level by level, into shallow ones; each fused level is compared with the teacher's, whole
and averaged to small grids.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.losses.inputs import check_pair, teacher_of
from distill.losses.maps import to_grid
from distill.losses.projector import convolution
from distill.precision import full_precision
from distill.protocols import Criterion, DataFacts, ModelFacts, ModelOutput, Needs, Regions, Target

WIDEST = 512
"""Channels that a fusion block has inside, at most."""
POOLED = Regions((1,))
Grid = tuple[int, int]


def hierarchical_loss(student: Tensor, teacher: Tensor, levels: tuple[int, ...] = (4, 2, 1)) -> Tensor:
    """The weighted mean of squared differences of whole maps and of both averaged to g x g: [B, C, H, W] x 2 -> [B].

    The whole maps weigh 1, and each g of `levels` below the smaller side of the map half of what came before it: 1/2, 1/4, 1/8.
    Source: dvlab-research/ReviewKD cede6ea, `hcl`, and mdistiller a08d46f, `hcl_loss`, which take the batch mean and compare g
    with the height. Computed in float32 (float64 stays), no gradient to the teacher. Raises ValueError for shapes that differ.
    """
    check_pair(student, teacher, "fused maps", dimensions=4)
    mine, theirs = full_precision(student), full_precision(teacher.detach())
    total, weight, weights = (mine - theirs).square().mean((1, 2, 3)), 1.0, 1.0
    for level in levels:
        if level < min(mine.shape[-2:]):
            weight /= 2
            weights += weight
            # averaging is linear: the difference is averaged once
            total = total + weight * to_grid(mine - theirs, level, level).square().mean((1, 2, 3))
    return total / weights


class FusionBlock(nn.Module):
    """Attention-based fusion (ABF): a student's level and the carry of the deeper ones -> the teacher's shape, the next carry.

    u = BN(conv1x1(level)); with a carry v, brought to the level's grid, u = g_0 u + g_1 v, g = sigmoid(conv1x1([u, v])) cell by
    cell. u on the teacher's grid is the next carry, BN(conv3x3(u)) the output. Nearest neighbours resize; there is no ReLU.
    It computes in the precision that autocast asks for.
    """

    def __init__(self, student_channels: int, middle: int, teacher_channels: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = convolution(student_channels, middle, 1)
        self.expand = convolution(middle, teacher_channels, 3)
        self.gate = None if deepest else nn.Conv2d(2 * middle, 2, 1)

    def forward(self, student_map: Tensor, deeper: Tensor | None, size: Grid) -> tuple[Tensor, Tensor]:
        """student_map [B, C_s, H, W], deeper [B, M, h, w] or None, the teacher's grid -> [B, C_t, *size] and [B, M, *size]."""
        fused = self.reduce(student_map)
        if self.gate is not None and deeper is not None:
            carried = _resized(deeper, fused.shape[-2:])
            gates = self.gate(torch.cat([fused, carried], dim=1)).sigmoid()
            fused = fused * gates[:, :1] + carried * gates[:, 1:]
        fused = _resized(fused, size)
        return self.expand(fused), fused


class ReviewKD(Criterion):
    """Knowledge review (ReviewKD; Chen et al., CVPR 2021): the sum over levels of `hierarchical_loss`, batch mean.

    Levels are the stages and the pooled vector, paired from the deep end: what one model has more of them is left out (the
    released code drops or mispairs it). Channels and grids may differ. The teacher's stages are before their last ReLU, or as
    they are where none ends them (ViT, MobileNet); of a class-token model the pooled vector is the mean of the grid.
    mdistiller calls BatchNorms of pre-activation students twice in a step to have them; here nothing runs twice.
    The released schedule is `warmup_epochs: 20` of the weight (none on ImageNet); weights 0.6 to 8 by pair.

    Args:
        student: facts of the student: the stages' channels.
        teacher: facts of the teacher: the same.
        data: facts of the data: the micro-batch.
        student_preactivations: take the student's stages before their last ReLU too, as released for ImageNet, not for CIFAR.
        middle_channels: channels inside the fusion blocks; 0 is the student's last, 512 at most. The authors' ResNet-50 to
            MobileNet run has 256, mdistiller's 512, with twice the parameters.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        data: DataFacts,
        *,
        student_preactivations: bool = False,
        middle_channels: int = 0,
    ) -> None:
        super().__init__()
        if middle_channels < 0:
            raise ValueError(f"middle_channels {middle_channels} must be positive, or 0 for the student's last stage's")
        if data.micro_batch == 1:
            raise ValueError("the pooled level is normalised over the batch, and a micro-batch of 1 has no deviation; take 2")
        levels = min(len(student.stages), len(teacher.stages))
        widths = [[stage.channels for stage in facts.stages[-levels:]] for facts in (student, teacher)]
        mine, theirs = ([*each, each[-1]] for each in widths)
        middle = middle_channels or min(WIDEST, mine[-1])
        # deepest first, the order in which they run
        self.blocks = nn.ModuleList(
            FusionBlock(mine[level], middle, theirs[level], deepest=level == levels) for level in range(levels, -1, -1)
        )
        self.stages = tuple(range(-1, -levels - 1, -1))
        self.student_preactivations = student_preactivations
        self.teacher_needs = Needs(region_features=(POOLED,), preactivations=self.stages)
        self.student_needs = self.teacher_needs
        if not student_preactivations:
            self.student_needs = Needs(region_features=(POOLED,), stages=self.stages)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over levels; and each level's own loss, by the stage's index from the end."""
        teacher = teacher_of(teacher, "reviewkd")
        mine = student.preactivations if self.student_preactivations else student.stages
        levels = [
            ("pooled", _pooled(student), _pooled(teacher)),
            *((f"stage{stage}", mine[stage], teacher.preactivations[stage]) for stage in self.stages),
        ]
        carry, losses = None, {}
        for block, (name, own, other) in zip(self.blocks, levels, strict=True):
            fused, carry = block(own, carry, other.shape[-2:])
            losses[f"{name}/loss"] = hierarchical_loss(fused, other).mean()
        return torch.stack(list(losses.values())).sum(), {name: loss.detach() for name, loss in losses.items()}


def _pooled(output: ModelOutput) -> Tensor:
    """The mean of the feature map, as a map of one cell: [B, C, 1, 1]."""
    return output.region_features[POOLED].transpose(1, 2).unsqueeze(-1)


def _resized(feature_map: Tensor, size: Grid) -> Tensor:
    """Nearest neighbours, by PyTorch's floor rule; the map itself where it has that grid."""
    return feature_map if feature_map.shape[-2:] == size else F.interpolate(feature_map, size, mode="nearest")
