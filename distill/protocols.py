"""What the rooms of the project say to each other: plain data and protocols, no behaviour, no imports of ours.

Shapes, by letter: B images of this process's micro-batch, K classes, C channels, H x W pixels or grid cells, R regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of this process, on the device it is consumed on."""

    images: Tensor
    """uint8 [B, H, W, 3], RGB; `.permute(0, 3, 1, 2)` of it is channels_last without a copy."""
    labels: Tensor
    """int64 [B], class indices."""
    sample_ids: Tensor
    """int64 [B] on the CPU: the row of each sample in the shard index."""


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to be fed: read off the `pretrained_cfg` of the instance, never of the architecture."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    """`bilinear` or `bicubic` (timm's names)."""
    crop_fraction: float
    """timm's `crop_pct`: evaluation resizes the shorter side to `floor(size / crop_fraction)`, then crops the centre."""


@dataclass(frozen=True)
class Regions:
    """A set of regions of a feature map, the same relative regions whatever the grid.

    `scales=(1, 2, 4)` are 1 + 4 + 16 = 21 cells: scale by scale, row-major in each; scale 1 is the whole image and comes
    first. `windows=(k, ...)` are sliding k x k windows of the grid with `stride`, after the scales.
    `mode` is the pooling of the scales: `area` (fractional overlap, a partition of the image), `adaptive` (adaptive average
    pooling of the full map) or `cascade` (SDD's released code: every scale is taken from the 4x4 adaptive grid).
    """

    scales: tuple[int, ...] = (1, 2, 4)
    mode: str = "area"
    windows: tuple[int, ...] = ()
    stride: int = 1


@dataclass(frozen=True)
class Needs:
    """What a criterion reads of one model's `ModelOutput`; the backbone computes nothing else."""

    region_logits: tuple[Regions, ...] = ()
    region_features: tuple[Regions, ...] = ()
    stages: tuple[int, ...] = ()
    """Stages of the backbone counted from its end: -1 is the feature map itself, -2 the stage before it, ..."""

    def __or__(self, other: Needs) -> Needs:
        """The union of both, in order of first mention."""

        def merged(mine: tuple, theirs: tuple) -> tuple:
            return tuple(dict.fromkeys(mine + theirs))

        return Needs(
            merged(self.region_logits, other.region_logits),
            merged(self.region_features, other.region_features),
            merged(self.stages, other.stages),
        )


class ModelOutput(NamedTuple):
    """Everything one forward pass of a backbone gives; entries that no criterion needs are absent."""

    logits: Tensor
    """[B, K], the model's own, bit for bit."""
    feature_map: Tensor
    """[B, C, H, W], the map that the model's head reads."""
    region_logits: Mapping[Regions, Tensor]
    """[B, R, K] for each `Regions` asked for; a region that is the whole image is `logits` itself (not in `cascade` mode)."""
    region_features: Mapping[Regions, Tensor]
    """[B, R, C] in float32: `feature_map` pooled over each region."""
    stages: Mapping[int, Tensor]
    """[B, C_i, H_i, W_i] for each stage asked for, by the index it was asked with; [-1] is `feature_map`."""


class Progress(NamedTuple):
    """Where training is; schedules are pure functions of it."""

    step: int
    """Optimiser steps done."""
    steps_per_epoch: int
    total_steps: int

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch


class Losses(NamedTuple):
    """What one call of the distiller gives; scalars on the device, no host synchronisation."""

    total: Tensor
    """Weighted sum of the terms, with gradient."""
    terms: dict[str, Tensor]
    """Each criterion's own value, unweighted, with gradient (so that a term's share of the gradient can be measured)."""
    statistics: dict[str, Tensor]
    """What criteria report beside their value (`sdd/complementary_share`, ...), detached."""


@runtime_checkable
class Criterion(Protocol):
    """A loss: a thin `nn.Module` over pure functions, made of plain arguments.

    Its parameters (a projector) train with the student and are dropped afterwards. Computes in float32 whatever autocast
    says, and gives the teacher no gradient.
    """

    student_needs: Needs
    teacher_needs: Needs | None
    """`teacher_needs` of a criterion that never looks at the teacher is `None`."""

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`labels` int64 [B], or float [B, K] (soft) where the criterion allows it -> scalar loss, detached statistics."""
        ...


class Loader(Protocol):
    """Batches of one split for this process; the visiting order is a pure function of (seed, epoch, step)."""

    num_samples: int
    """Samples of the whole split, over all processes."""
    batches_per_epoch: int
    """Micro-batches that this process yields per epoch."""

    @property
    def bad_samples(self) -> list[int]:
        """Samples of the split that this process knows to be bad, sorted: replaced in training, left out of evaluation."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the position: all that the stream is a function of, and `bad_samples`; plain JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the bad samples of a state, of this or of other processes; the stream stays the same, bit for bit.

        Raises ValueError, with both values, for the state of another stream.
        """
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The micro-batches of this epoch from number `start` on; may be called for any epoch at any time."""
        ...

    def close(self) -> None:
        """Releases files, threads and device memory; calling it twice is harmless."""
        ...
