"""MGD: masked generative distillation (Yang et al., ECCV 2022): the teacher's map generated from a masked student's map."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distill.losses.inputs import check_pair, teacher_of
from distill.losses.maps import smaller_grid, to_grid
from distill.precision import full_precision
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Target

MASKS = ("channel", "cell")


def channel_mask(uniform: Tensor, ratio: float) -> Tensor:
    """True where a channel is kept, [B, C, 1, 1]: where its uniform number is at least `ratio`.

    Source: yzd-v/MGD 2c9da0b, `classification`.
    """
    return uniform >= ratio


def cell_mask(uniform: Tensor, ratio: float) -> Tensor:
    """True where a cell is kept, [B, 1, H, W]: where its uniform number is at most 1 - `ratio`.

    Source: yzd-v/MGD 2c9da0b, `detection`.
    """
    return uniform <= 1 - ratio


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """The sum of squared differences of each image's maps: [B, C, H, W] x 2 -> [B].

    A sum, as published: it grows with channels and cells, and its weight is 7e-5. In float32 (float64 stays): in half it
    overflows. No gradient to the teacher. Raises ValueError for shapes that differ.
    """
    check_pair(generated, teacher, "maps", dimensions=4)
    return (full_precision(generated) - full_precision(teacher.detach())).square().sum((1, 2, 3))


class MGD(Criterion):
    """Masked generative distillation (MGD; Yang et al., ECCV 2022): the batch mean of `mgd_loss` of the last maps.

    conv1x1 to the teacher's channels where they differ, a random mask, then conv3x3 - ReLU - conv3x3, all with biases; what is
    masked is 0 and the rest is not rescaled. The mask is another in every call, a function of (seed, step, rank). For any two
    models with maps (a class token has no part). The released code asserts equal grids; here the larger map is averaged
    adaptively to the smaller grid first.

    Args:
        student: facts of the student: its channels.
        teacher: facts of the teacher: its channels.
        mask: channel, as in the released classification code, or cell, as in the paper's text and for detection.
        mask_ratio: share that is masked, 0 to 1; 0.15 for channels as released, 0.65 for cells in detection.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        mask: Literal["channel", "cell"] = "channel",
        mask_ratio: float = 0.15,
    ) -> None:
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask {mask!r} is unknown; choose one of {', '.join(MASKS)}")
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio {mask_ratio} must lie in 0..1: it is the share that is masked")
        self.mask, self.mask_ratio = mask, mask_ratio
        channels, wanted = student.stages[-1].channels, teacher.stages[-1].channels
        self.align = nn.Identity() if channels == wanted else nn.Conv2d(channels, wanted, 1)
        self.generator = nn.Sequential(
            nn.Conv2d(wanted, wanted, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(wanted, wanted, 3, padding=1)
        )
        self.student_needs = self.teacher_needs = Needs(stages=(-1,))

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; and the share of channels or cells that was masked."""
        mine, theirs = student.feature_map, teacher_of(teacher, "mgd").feature_map.detach()
        grid = smaller_grid(mine, theirs)
        aligned = self.align(to_grid(mine, *grid))
        uniform = self._uniform(aligned, target.generator)
        kept = channel_mask(uniform, self.mask_ratio) if self.mask == "channel" else cell_mask(uniform, self.mask_ratio)
        loss = mgd_loss(self.generator(aligned * kept), to_grid(theirs, *grid)).mean()
        return loss, {"masked_share": 1 - kept.float().mean()}

    def _uniform(self, aligned: Tensor, generator: torch.Generator | None) -> Tensor:
        """A number in [0, 1) for each channel or cell of each image, float32 whatever the map is."""
        images, channels, height, width = aligned.shape
        shape = (images, channels, 1, 1) if self.mask == "channel" else (images, 1, height, width)
        return torch.rand(shape, generator=generator, device=aligned.device)
