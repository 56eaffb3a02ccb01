"""WKD-F: the mean and the spread of each channel, cell by cell of a coarse grid, are the teacher's."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from distill.losses.fitnet import FitNetRegressor
from distill.losses.inputs import check_rows, check_weights, teacher_of
from distill.losses.maps import Maps, Source
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, MapShape, ModelFacts, ModelOutput, Target
from distill.regions import pooling_matrix

EPS = 1e-5
Projector = Literal["bottleneck", "convolution", "1x1", "none"]
PROJECTORS = get_args(Projector)


def wkd_feature_loss(student_map: Tensor, teacher_map: Tensor, grid: int = 4, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """The squared differences of means and of deviations of each image, summed over channels, mean over cells: two of [B].

    student_map [B, C, H_s, W_s], teacher_map [B, C, H_t, W_t]; each has g x g cells of its own, as adaptive average pooling has
    them, which overlap where g does not divide a side. A deviation is sqrt(unbiased variance + eps). Their sum is the squared
    Wasserstein distance of diagonal Gaussians. Source: Lv et al., NeurIPS 2024; JiamingLv/WKD 214cf88. Where we differ: both
    maps may have sizes of their own; a cell of one pixel, which has no variance, raises ValueError (there: NaN). Computed in
    float32 (float64 stays), variances after each map's mean is taken off: E[x^2] - E[x]^2 alone is wrong by 3 percent at mean
    50 and variance 1/12. No gradient to the teacher.
    """
    check_rows(student_map, teacher_map, "wkd_feature", dimensions=(4,))
    if student_map.shape[1] != teacher_map.shape[1]:
        raise ValueError(
            f"wkd_feature: {student_map.shape[1]} and {teacher_map.shape[1]} channels; project the student's first"
        )
    with no_autocast(student_map):
        mine, theirs = (moments(each, grid, eps) for each in (student_map, teacher_map.detach()))
        means, deviations = ((a - b).square().sum((1, 2)) / grid**2 for a, b in zip(mine, theirs, strict=True))
    return means, deviations


def moments(feature_map: Tensor, grid: int, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel in each cell: [B, C, H, W] -> [B, C, g^2] x 2, row-major."""
    height, width = feature_map.shape[-2:]
    check_cells(height, width, grid)
    cells = full_precision(feature_map).flatten(2)
    matrix, pixels = _cells(height, width, grid, cells.dtype, cells.device)
    # a variance does not know where 0 is, so that the centre needs no gradient of its own
    centre = cells.detach().mean(2, keepdim=True)
    cells = cells - centre
    mean = cells @ matrix.T
    variance = (cells.square() @ matrix.T - mean.square()).clamp_min(0) * (pixels / (pixels - 1))
    return mean + centre, (variance + eps).sqrt()


def check_cells(height: int, width: int, grid: int) -> None:
    """Raises ValueError unless every cell of a g x g grid has two pixels."""
    if grid < 1:
        raise ValueError(f"grid {grid} must be at least 1")
    sides = [min(-(-(cell + 1) * side // grid) - cell * side // grid for cell in range(grid)) for side in (height, width)]
    if sides[0] * sides[1] < 2:
        raise ValueError(
            f"grid {grid} has cells of one pixel on a {height} x {width} map, which have no variance; take a smaller one"
        )


@lru_cache(maxsize=64)
def _cells(height: int, width: int, grid: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pooling matrix [g^2, H W] and each cell's number of pixels [g^2], on the device, made once."""
    with torch.inference_mode(False):  # tensors made under it cannot be used in training
        matrix = pooling_matrix(height, width, (grid,), "adaptive").to(device=device, dtype=dtype)
        return matrix, (matrix > 0).sum(1).to(dtype)


class BottleneckProjector(nn.Module):
    """1x1 to `hidden` channels, 3x3, 1x1 to the teacher's, with biases and nothing between, then BN and ReLU."""

    def __init__(self, student_channels: int, teacher_channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(student_channels, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(hidden, teacher_channels, 1)
        self.bn = nn.BatchNorm2d(teacher_channels)

    def forward(self, feature_map: Tensor) -> Tensor:
        """The map in the teacher's channels."""
        return self.bn(self.conv3(self.conv2(self.conv1(feature_map)))).relu()


def build_map_projector(kind: Projector, student: MapShape, teacher: MapShape) -> nn.Module:
    """What brings the student's map to the teacher's channels; raises ValueError for an unknown or impossible one."""
    if kind not in PROJECTORS:
        raise ValueError(f"projector {kind!r} is unknown; choose one of {', '.join(PROJECTORS)}")
    if kind == "bottleneck":
        return BottleneckProjector(student.channels, teacher.channels)
    if kind == "none":
        if student.channels != teacher.channels:
            raise ValueError(
                f"projector 'none' leaves {student.channels} channels, the teacher has {teacher.channels}; choose 'bottleneck'"
            )
        return nn.Identity()
    grids = [(each.height, each.width) if kind == "convolution" else (1, 1) for each in (student, teacher)]
    try:
        return FitNetRegressor(student.channels, teacher.channels, grids[0], grids[1])
    except ValueError:
        raise ValueError(
            f"projector 'convolution' brings no {student.height} x {student.width} map to {teacher.height} x {teacher.width};"
            " choose 'bottleneck' or '1x1', which keep the student's grid"
        ) from None


class WKDFeature(Criterion):
    """WKD-F (Lv et al., NeurIPS 2024) on the last maps of both models.

    Defined for every pair whose maps have two pixels or more in each cell. Maps need not have one size: cells are parts of the
    image. (Released code first brings the student's map to the teacher's size, `projector: convolution`, or wants equal
    heights, `bottleneck`.) The projector ends in a ReLU, so it fits teachers whose map does. The loss sums over channels, so
    its weight goes with 1 / C: 0.02 for ResNet-34 -> ResNet-18, 0.005 for ResNet-50 -> MobileNetV1.

    Args:
        student: facts of the student; the shape of its last map gives the projector.
        teacher: facts of the teacher.
        source: stages (the map that the head reads) or blocks (the network's last own map).
        projector: bottleneck (as on ImageNet), convolution (as on CIFAR, to the teacher's size), 1x1, or none.
        grid: cells along each side; 4 on ImageNet, 1 or 4 on CIFAR-100.
        mean_weight: of the means against the deviations, whose weight is 1; 2 on ImageNet, 3 to 8 on CIFAR-100.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        source: Source = "stages",
        projector: Projector = "bottleneck",
        grid: int = 4,
        mean_weight: float = 2.0,
    ) -> None:
        super().__init__()
        check_weights(mean_weight=mean_weight)
        self.student_map, self.teacher_map = Maps(student, source, (-1,)), Maps(teacher, source, (-1,))
        self.student_needs, self.teacher_needs = self.student_map.needs, self.teacher_map.needs
        (mine,), (theirs,) = self.student_map.shapes, self.teacher_map.shapes
        self.grid, self.mean_weight = grid, mean_weight
        self.projector = build_map_projector(projector, mine, theirs)
        for each in (theirs,) if projector == "convolution" else (mine, theirs):
            check_cells(each.height, each.width, grid)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch mean of mean_weight x means + deviations; and both, unweighted."""
        (mine,), (theirs,) = self.student_map.of(student), self.teacher_map.of(teacher_of(teacher, "wkd_feature"))
        means, deviations = (rows.mean() for rows in wkd_feature_loss(self.projector(mine), theirs, self.grid))
        return self.mean_weight * means + deviations, {"means": means.detach(), "deviations": deviations.detach()}
