"""Model outputs for the criteria, made of random maps and a linear head."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.loss_options import run_parameters
from distill.losses import LOSSES
from distill.protocols import Criterion, DataFacts, MapShape, ModelFacts, ModelOutput, Needs
from distill.regions import pool, region_matrix

CHANNELS = {"student": (4, 6, 8), "teacher": (3, 5, 10, 12)}
GRIDS = {"student": (28, 14, 7), "teacher": (56, 28, 14, 7)}
BLOCKS = {
    "student": (MapShape(4, 28, 28), MapShape(4, 28, 28), MapShape(6, 14, 14), MapShape(7, 7, 7)),
    "teacher": (MapShape(3, 28, 28), MapShape(5, 14, 14), MapShape(9, 14, 14), MapShape(11, 7, 7), MapShape(12, 7, 7)),
}
FACTS = {
    side: ModelFacts(
        6,
        tuple(MapShape(width, grid, grid) for width, grid in zip(CHANNELS[side], GRIDS[side], strict=True)),
        BLOCKS[side],
        embedding=CHANNELS[side][-1],
    )
    for side in CHANNELS
}
DATA = DataFacts(40, torch.arange(40) % 6, 4)
RUN_FACTS = {**FACTS, "data": DATA}


def made(loss: str, **options) -> Criterion:
    """The criterion of this name over the models and the data of this file."""
    return LOSSES[loss](**{name: RUN_FACTS[name] for name in run_parameters(LOSSES[loss])}, **options)


def facts(*channels: int) -> ModelFacts:
    """A model whose stages have these channels, on 7 x 7 maps."""
    return ModelFacts(6, tuple(MapShape(width, 7, 7) for width in channels))


def model_output(
    side: str, needs: Needs, seed: int = 0, batch: int = 4, classes: int = 6, dtype=torch.float32, grids=None
) -> ModelOutput:
    """What a backbone with a linear head gives for `needs`; the student's maps are leaves that take a gradient."""
    generator = torch.Generator().manual_seed(seed + len(side))
    channels, grids = CHANNELS[side], grids or GRIDS[side]
    stages: dict[int, Tensor] = {}
    for number, (width, grid) in enumerate(zip(channels, grids, strict=True)):
        size = grid if isinstance(grid, tuple) else (grid, grid)
        feature_map = torch.randn(batch, width, *size, generator=generator).to(dtype)
        stages[number - len(channels)] = feature_map.requires_grad_(side == "student")
    head = torch.randn(classes, channels[-1], generator=generator).to(dtype)
    last = stages[-1]
    region_logits = {
        regions: (pool(last, region_matrix(*last.shape[-2:], regions)).to(dtype) @ head.T) for regions in needs.region_logits
    }
    region_features = {regions: pool(last, region_matrix(*last.shape[-2:], regions)) for regions in needs.region_features}
    blocks = {}
    for index in needs.blocks:
        blocks[index] = (
            torch.randn(batch, *BLOCKS[side][index], generator=generator).to(dtype).requires_grad_(side == "student")
        )
    inner = {}
    for index in needs.preactivations:
        inner[index] = torch.randn(stages[index].shape, generator=generator).to(dtype).requires_grad_(side == "student")
    bias = torch.randn(classes, generator=generator).to(dtype) if needs.head_bias else None
    if bias is not None:
        region_logits = {regions: each + bias for regions, each in region_logits.items()}
    embedding = last.mean((-1, -2))
    return ModelOutput(
        embedding @ head.T,
        last,
        region_logits,
        region_features,
        {index: stages[index] for index in needs.stages},
        preactivations=inner,
        blocks=blocks,
        embedding=embedding if needs.embedding else None,
        head_bias=bias,
    )
