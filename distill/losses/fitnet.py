"""FitNet hints: a regressor brings the student's map to the teacher's shape, and the mean squared error compares them."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from distill.losses.inputs import check_pair, teacher_of
from distill.losses.maps import Maps, Match, Source, available, smaller_grid, to_grid
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, MapShape, ModelFacts, ModelOutput, Target

Grid = tuple[int, int]


def fitnet_loss(predicted_map: Tensor, teacher_map: Tensor) -> Tensor:
    """The mean over channels and cells of (r(F_s) - F_t)^2 for each image: [B, C, H, W] x 2 -> [B].

    Source: Romero et al., ICLR 2015, eq. 3, without its factor of 1/2; mdistiller a08d46f, `FitNet`, whose scalar is our batch
    mean. Computed in float32 (float64 stays): the square of 300 overflows float16. No gradient to the teacher.
    """
    check_pair(predicted_map, teacher_map, "fitnet", dimensions=4)
    with no_autocast(predicted_map):
        return (full_precision(predicted_map) - full_precision(teacher_map.detach())).square().mean((1, 2, 3))


class FitNetRegressor(nn.Module):
    """Convolution with bias, BN, ReLU: [B, C_s, H_s, W_s] -> [B, C_t, H_t, W_t].

    The convolution follows the heights, as in mdistiller's `ConvReg`: 3x3 of stride 2 where the student's is twice the
    teacher's, transposed 4x4 of stride 2 where it is half, else without padding, of kernel 1 + H_s - H_t by 1 + W_s - W_t.
    Raises ValueError where these give another shape than the teacher's (there: a TypeError, or an error in the first step).
    Parameters: kernel height x kernel width x C_s x C_t + 3 C_t. It computes in the precision that autocast asks for.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, student_grid: Grid, teacher_grid: Grid, relu: bool = True
    ) -> None:
        super().__init__()
        channels = (student_channels, teacher_channels)
        (height, width), (teacher_height, teacher_width) = student_grid, teacher_grid
        if height == 2 * teacher_height:
            self.conv: nn.Module = nn.Conv2d(*channels, 3, stride=2, padding=1)
            made = (teacher_height, (width + 1) // 2)
        elif 2 * height == teacher_height:
            self.conv = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
            made = (teacher_height, 2 * width)
        else:
            kernel = (1 + height - teacher_height, 1 + width - teacher_width)
            made = (teacher_height, teacher_width) if min(kernel) >= 1 else (0, 0)
            if made == teacher_grid:
                self.conv = nn.Conv2d(*channels, kernel)
        if made != tuple(teacher_grid):
            raise ValueError(
                f"no convolution brings a {height} x {width} map to {teacher_height} x {teacher_width}; set match: pool, which"
                " pools the larger map to the smaller, or choose another pair of maps"
            )
        self.bn = nn.BatchNorm2d(teacher_channels)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, feature_map: Tensor) -> Tensor:
        """The map in the teacher's shape."""
        return self.relu(self.bn(self.conv(feature_map)))


def build_regressor(student: MapShape, teacher: MapShape, match: Match, relu: bool) -> FitNetRegressor:
    """The regressor between two maps; with `match` pool a 1x1 one, for maps that `matched` has brought to one grid.

    Raises ValueError for another `match`, and as `FitNetRegressor`.
    """
    if match not in get_args(Match):
        raise ValueError(f"match {match!r} is unknown; choose one of {', '.join(get_args(Match))}")
    grids = ((student.height, student.width), (teacher.height, teacher.width)) if match == "convolution" else ((1, 1), (1, 1))
    return FitNetRegressor(student.channels, teacher.channels, *grids, relu=relu)


def matched(student: Tensor, teacher: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Both maps, with `match` pool on the smaller's grid; the teacher's detached."""
    teacher = teacher.detach()
    if match == "convolution":
        return student, teacher
    grid = smaller_grid(student, teacher)
    return to_grid(student, *grid), to_grid(teacher, *grid)


class FitNet(Criterion):
    """FitNet hints (Romero et al., ICLR 2015), trained together with the other losses, as in the papers' tables.

    The paper trains in two stages, first the hint alone; here weights that change do (`start_epoch`, `final_weight`). Defined
    for every pair with `match: pool`; without it, where the maps' sizes fit a convolution. The papers' weight is 100.

    Args:
        student: facts of the student; channels and grid of its map give the regressor.
        teacher: facts of the teacher.
        source: stages (one map for each resolution) or blocks (the network's own, which released code reads).
        pair: the student's and the teacher's map, such as [-1, -1]; None is the second of each, as in released code.
        match: convolution (as released) or pool (the larger map is pooled to the smaller, then 1x1: fewer parameters).
        relu: end the regressor with a ReLU, as released; it cannot reach the negative entries that some teachers' maps have.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        source: Source = "stages",
        pair: tuple[int, int] | None = None,
        match: Match = "convolution",
        relu: bool = True,
    ) -> None:
        super().__init__()
        # a plain ViT has one stage only
        mine, theirs = pair or (min(1, len(available(each, source)) - 1) for each in (student, teacher))
        self.student_map, self.teacher_map = Maps(student, source, (mine,)), Maps(teacher, source, (theirs,))
        self.student_needs, self.teacher_needs = self.student_map.needs, self.teacher_map.needs
        self.match = match
        (own,), (other,) = self.student_map.shapes, self.teacher_map.shapes
        self.regressor = build_regressor(own, other, match, relu)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch mean."""
        (mine,), (theirs,) = self.student_map.of(student), self.teacher_map.of(teacher_of(teacher, "fitnet"))
        mine, theirs = matched(mine, theirs, self.match)
        return fitnet_loss(self.regressor(mine), theirs).mean(), {}
