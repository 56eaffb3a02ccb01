"""The words that the rooms of the project share: plain data and interfaces, no behaviour, no imports of ours.

Shapes, by letter: B images of this process's micro-batch, K classes, C channels, H x W pixels or grid cells, R regions,
D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Batch(NamedTuple):
    """One micro-batch of this process, on the device it is consumed on."""

    images: Tensor
    """uint8 [B, H, W, 3], RGB; `.permute(0, 3, 1, 2)` of it is channels_last without a copy."""
    labels: Tensor
    """int64 [B], class indices."""
    sample_ids: Tensor
    """int64 [B]: the row in the shard index of each image that is really shown, 0 to the number of samples less one."""
    teacher: Tensor | None = None
    """uint8 [B, bytes]: what a teacher cache holds of each image, as its codec packs it; None where the teacher is live."""
    plain: Tensor | None = None
    """bool [B]: the views that are cut and flipped only, where others of the same images are altered too; None where all are
    made alike."""


Interpolation = Literal["bilinear", "bicubic"]
"""timm's names."""
ClassTokens = Literal["attend", "shift", "repeat"]
"""Definitions of a region's logits where the head reads class tokens only."""
BatchNormMode = Literal["local", "sync", "frozen"]
"""Where a training BatchNorm has its statistics from: the batch of its process, that of all processes, or none."""


@dataclass(frozen=True)
class InputSpec:
    """What a model wants to be fed: read off the `pretrained_cfg` of the instance, never of the architecture."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
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
    preactivations: tuple[int, ...] = ()
    """The same stages, before the activation that ends them; the stage itself where none does."""
    blocks: tuple[int, ...] = ()
    """Maps of `forward_intermediates` by its own index, as the network has them: no curation, equal resolutions kept."""
    embedding: bool = False
    """What the model's last linear layer reads."""
    head_bias: bool = False
    """The logits of an empty feature map: the part of the logits that no cell of the map gives."""
    logits: bool = False
    """The logits of the whole image. Every model with a classifier gives them unasked; a criterion that reads them says so, and
    is then refused before the run for a teacher that has none."""

    def __or__(self, other: Needs) -> Needs:
        """The union of both, in order of first mention."""

        def merged(mine: Any, theirs: Any) -> Any:
            return mine or theirs if isinstance(mine, bool) else tuple(dict.fromkeys(mine + theirs))

        return Needs(**{f.name: merged(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


class ModelOutput(NamedTuple):
    """Everything one forward pass of a backbone gives; entries that no criterion needs are absent."""

    logits: Tensor
    """[B, K], the model's own, bit for bit; [B, 0] where the model has no classifier."""
    feature_map: Tensor
    """[B, C, H, W], the map that the model's head reads."""
    region_logits: Mapping[Regions, Tensor]
    """[B, R, K] for each `Regions` asked for; a region that is the whole image is `logits` itself (not in `cascade` mode)."""
    region_features: Mapping[Regions, Tensor]
    """[B, R, C] in float32: `feature_map` pooled over each region."""
    stages: Mapping[int, Tensor]
    """[B, C_i, H_i, W_i] for each stage asked for, by the index it was asked with; [-1] is `feature_map`."""
    preactivations: Mapping[int, Tensor] = {}
    """[B, C_i, H_i, W_i] for each one asked for, by the stage's index."""
    blocks: Mapping[int, Tensor] = {}
    """[B, C_i, H_i, W_i] for each block asked for, by the index it was asked with."""
    embedding: Tensor | None = None
    """[B, D], what the last linear layer reads; of a model without a classifier, what its head gives."""
    head_bias: Tensor | None = None
    """[K], the logits of an empty feature map."""


class MapShape(NamedTuple):
    """The shape of one image's map."""

    channels: int
    height: int
    width: int


class Affine(NamedTuple):
    """Scale and shift of a normalisation layer, each [C], detached, on the CPU."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before the first step, at its own input size; criteria are made from it."""

    num_classes: int
    """0 for a model without a classifier."""
    stages: tuple[MapShape, ...]
    """First to last; the last is the feature map."""
    blocks: tuple[MapShape, ...] = ()
    """Maps of `forward_intermediates`, by its own index."""
    embedding: int = 0
    """D, the numbers of an image's embedding; 0 where the model has a classifier that is not one linear layer."""
    preactivation_norms: tuple[Affine | None, ...] = ()
    """The normalisation that each stage's pre-activation comes from; None where there is none."""
    classifier: Tensor | None = None
    """The weight [num_classes, D] of the linear layer that gives the logits, in the order of the data's classes, detached, on
    the CPU; None where `embedding` is 0 or there is no classifier."""


class DataFacts(NamedTuple):
    """What is known of the training data before the first step."""

    num_samples: int
    """Samples of the training split; `Target.sample_ids` are smaller."""
    sample_labels: Tensor
    """int64 [num_samples] on the CPU: the class of every sample."""
    micro_batch: int
    """B, the images of one call on one process; the same in every call."""
    class_names: tuple[str, ...] = ()
    """Names by class number; empty where nobody knows them."""


class Progress(NamedTuple):
    """The place in training; schedules are pure functions of it."""

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
    """Each criterion's own value, unweighted, with gradient."""
    weighted: dict[str, Tensor]
    """Each of them times its weight, with gradient (so that a term's share of the gradient can be measured)."""
    statistics: dict[str, Tensor]
    """What criteria report beside their value (`sdd/complementary_share`, ...), detached."""


class Target(NamedTuple):
    """What a step knows beside the models' outputs. A run gives all of it; a loop of your own, what its criteria read."""

    labels: Tensor
    """int64 [B], or float [B, K] (soft: mixed images) for criteria that accept it."""
    sample_ids: Tensor | None = None
    """int64 [B] on the labels' device: each image's row in the index of the training split."""
    progress: Progress = Progress(0, 1, 1)
    generator: torch.Generator | None = None
    """A generator on the labels' device, seeded from (seed, step, rank): a resumed run draws the same numbers again."""
    plain: Tensor | None = None
    """bool [B] on the labels' device, as in `Batch`."""


class Gathered(NamedTuple):
    """Rows of vectors that every process gathers from every other."""

    rows: int
    """Rows of one process."""
    width: int
    """Numbers of a row."""
    gathered: bool
    """Whether the loss is set to gather them; without, each process keeps to its own."""


class Criterion(nn.Module):
    """The base of every loss: what it reads, and what the run has to know of it. A subclass gives the needs and `forward`.

    Constructor parameters before `*` come from the run: `student` and `teacher` (`ModelFacts`; the teacher's is None where
    there is none) and `data` (`DataFacts`), whichever it names. Those after `*` are its recipe keys, with their defaults.

    Its parameters (a projector) train with the student and are dropped afterwards. Its buffers are its state: checkpoints
    keep them, and DDP never sends them from rank to rank. So a state that steps change must be changed alike on every rank
    (gather first), under `torch.no_grad()`, and from finite values only: a step that turns out to be poisoned is not made,
    but its forward pass has run.
    """

    student_needs: Needs = Needs()
    teacher_needs: Needs | None = Needs()
    """None for a criterion that never looks at the teacher."""
    accepts_soft_labels: bool = True
    """Whether it can be computed with mixed images, whose labels are float [B, K]."""
    build_student: ClassVar[Callable[..., nn.Module] | None] = None
    """A static method of a loss that trains another student than the recipe's; None: it trains the recipe's.

    `build_student(student, teacher, student_images=..., teacher_images=..., **options)` makes that student, a timm model, from
    the recipe's student and the teacher. The images are noise of each model's input size, [N, C, H, W]; the options are all
    recipe keys of the loss. It is called before the losses are made, and only where the teacher has a classifier of the data's
    classes. It raises ValueError for models that it cannot be made of."""
    rests: bool = False
    """Whether some of its parameters rest in some epochs: its value does not reach them then, and the optimiser leaves them as
    they are. What it reaches may change with `Target.progress.epoch` alone."""
    reads_plain: bool = False
    """Whether it reads `Target.plain`, which a run has where its recipe says `augment.plain_repeats`."""
    teacher_temperature: float | None = None
    """The one temperature at which it reads the teacher's logits, through nothing but their softmax over the classes of an
    image; None: it reads them otherwise."""
    no_weight_decay: frozenset[str] = frozenset()
    """Names of its parameters that the optimiser does not decay."""

    def __init__(self) -> None:  # without it the signature of a loss that has no constructor would be nn.Module's
        super().__init__()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a float32 scalar whatever autocast says, without a gradient to the teacher; and detached statistics."""
        raise NotImplementedError

    def advice(self) -> str:
        """What makes this loss cheaper, as options of the recipe, for reports; empty where nothing does."""
        return ""

    def traffic(self) -> tuple[Gathered, ...]:
        """What the last call gathered from all processes, or would gather on several."""
        return ()


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
