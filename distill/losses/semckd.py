"""SemCKD: semantic calibration of cross-layer distillation (Chen et al., AAAI 2021).

Every stage of the student learns from every stage of the teacher; an attention over the teacher's stages, made of how alike the
images of the batch are to each stage, weighs them image by image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.losses.inputs import check_pair, check_temperature, teacher_of
from distill.losses.maps import Maps, Source, available, smaller_grid, to_grid
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, DataFacts, MapShape, ModelFacts, ModelOutput, Target

FACTOR = 4
"""Images of the batch for one number of an embedding."""
SMALLEST_BATCH = 2 * FACTOR
"""Images that a batch must have. With fewer, an embedding is one number, and its unit vector is 1 or -1 whatever it is."""
SMALLEST_NORM = 1e-6
"""Shorter embeddings have no direction; the released code divides 0 by 0."""


def gram_rows(feature_map: Tensor) -> Tensor:
    """The inner products of every two images' maps: [B, C, H, W] -> [B, B].

    Sums over C H W numbers, not normalised, as released: in float32 (float64 stays), for half precision overflows.
    """
    with no_autocast(feature_map):
        rows = full_precision(feature_map).flatten(1)
        return rows @ rows.T


def semckd_attention(queries: Tensor, keys: Tensor, softness: float = 1.0) -> Tensor:
    """The softmax over the teacher's stages of q . k / softness: unit vectors [B, S, d], [B, T, d] -> [B, S, T].

    Source: DefangChen/SemCKD ebe5db1, without softness; DefangChen/SimKD 2b389c3, with it.
    """
    with no_autocast(queries):
        return (queries @ keys.transpose(1, 2) / softness).softmax(-1)


def semckd_loss(attention: Tensor, distances: Tensor) -> Tensor:
    """The attention-weighted sum of distances over the teacher's stages, mean over the student's: [B, S, T] x 2 -> [B].

    The paper sums over the student's stages, the released code averages. Raises ValueError for shapes that differ.
    """
    check_pair(distances, attention, "distances and attention", dimensions=3)
    return (attention * distances).sum(2).mean(1)


class SemCKD(Criterion):
    """Cross-layer distillation with semantic calibration (SemCKD; Chen et al., AAAI 2021): the batch mean of `semckd_loss`.

    A pair's distance is the mean squared difference of the teacher's map and the student's behind a regressor (conv1x1 - BN -
    ReLU - conv3x3 - BN - ReLU - conv1x1, 2 C_t inside); the larger grid is averaged adaptively. Any numbers of stages, channels
    and grids; one pair is plain regression, its attention 1. Weight 400 on CIFAR-100, 50 on ImageNet, with KD 1 beside it.
    Nothing normalises the squares, so the weight counts times the mean square of the teacher's maps, and up to T times more
    once the attention has settled on one stage. A loss that explodes after some steps wants a smaller learning rate or weight.

    The embeddings read rows of the B x B inner products, so the micro-batch is a part of the architecture: B is that of one
    process, ranks and accumulation change the result, and a batch of another size is refused (released code skips the step).
    The dearest method here: S x T regressors, 10.2 M parameters for resnet32x4 -> resnet8x4, 54.8 M for ResNet-34 -> ResNet-18.

    Args:
        student: facts of the student: the stages' channels.
        teacher: facts of the teacher: the same.
        data: facts of the data: the micro-batch, at least 8.
        source: stages (one map for each resolution) or blocks (the network's own, which released code reads).
        softness: what the attention's logits are divided by; 1 as released.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        data: DataFacts,
        *,
        source: Source = "stages",
        softness: float = 1.0,
    ) -> None:
        super().__init__()
        if data.micro_batch < SMALLEST_BATCH:
            raise ValueError(
                f"semckd embeds an image in micro-batch / {FACTOR} numbers; a micro-batch of {data.micro_batch} leaves "
                f"{data.micro_batch // FACTOR}, with which its attention cannot learn; take {SMALLEST_BATCH} or more"
            )
        check_temperature(softness)
        self.softness = softness
        self.student_maps, self.teacher_maps = _all_maps(student, source), _all_maps(teacher, source)
        self.pairs = CrossLayer(self.student_maps.shapes, self.teacher_maps.shapes, data.micro_batch)
        self.student_needs, self.teacher_needs = self.student_maps.needs, self.teacher_maps.needs

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; and the mean attention that each of the teacher's stages gets, by its index from the end."""
        mine, theirs = self.student_maps.of(student), self.teacher_maps.of(teacher_of(teacher, "semckd"))
        attention, distances = self.pairs(mine, [each.detach() for each in theirs], self.softness)
        shares = attention.detach().mean((0, 1))
        statistics = {f"attention{number - len(theirs)}": share for number, share in enumerate(shares)}
        return semckd_loss(attention, distances).mean(), statistics


class CrossLayer(nn.Module):
    """Attention and distances [B, S, T] of every pair of stages, for batches of exactly B images."""

    def __init__(self, student: Sequence[MapShape], teacher: Sequence[MapShape], batch: int) -> None:
        super().__init__()
        self.batch = batch
        size = batch // FACTOR
        self.queries = nn.ModuleList(_embedding(batch, size) for _ in student)
        self.keys = nn.ModuleList(_embedding(batch, size) for _ in teacher)
        self.regressors = nn.ModuleDict(
            {
                f"{i}-{j}": _regressor(own.channels, other.channels)
                for i, own in enumerate(student)
                for j, other in enumerate(teacher)
            }
        )

    def forward(self, student: list[Tensor], teacher: list[Tensor], softness: float) -> tuple[Tensor, Tensor]:
        """Maps of both, the teacher's detached. ValueError for a batch of another size."""
        if len(student[0]) != self.batch:
            raise ValueError(f"semckd was made for micro-batches of {self.batch} images and got {len(student[0])}")
        queries, keys = _embedded(self.queries, student), _embedded(self.keys, teacher)
        distances = [
            _distance(self.regressors[f"{i}-{j}"], mine, theirs)
            for i, mine in enumerate(student)
            for j, theirs in enumerate(teacher)
        ]
        shape = (len(student), len(teacher))
        return semckd_attention(queries, keys, softness), torch.stack(distances, dim=1).unflatten(1, shape)


def _all_maps(facts: ModelFacts, source: Source) -> Maps:
    return Maps(facts, source, tuple(range(len(available(facts, source)))))


def _embedded(embeddings: nn.ModuleList, maps: list[Tensor]) -> Tensor:
    """A unit vector for each image and map, [B, maps, d], in full precision: the inner products are large."""
    with no_autocast(maps[0]):
        found = torch.stack([embed(gram_rows(each)) for embed, each in zip(embeddings, maps, strict=True)], dim=1)
        return found / torch.linalg.vector_norm(found, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)


def _distance(regress: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference behind the regressor, on the smaller grid: [B]."""
    grid = smaller_grid(student, teacher)
    predicted = full_precision(regress(to_grid(student, *grid)))
    return (predicted - to_grid(teacher, *grid)).square().mean((1, 2, 3))


def _embedding(batch: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(batch, 2 * size), nn.ReLU(), nn.Linear(2 * size, size))


def _regressor(channels: int, wanted: int) -> nn.Sequential:
    """Convolutions without bias; PyTorch's own initialisation."""
    inner = 2 * wanted
    return nn.Sequential(
        nn.Conv2d(channels, inner, 1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False),
        nn.BatchNorm2d(inner),
        nn.ReLU(inplace=True),
        nn.Conv2d(inner, wanted, 1, bias=False),
    )
