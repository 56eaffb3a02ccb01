"""The maps of a model that a loss reads, the pairs of two models' maps, and the way to one grid."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.precision import full_precision, no_autocast
from distill.protocols import MapShape, ModelFacts, ModelOutput, Needs
from distill.regions import adaptive_side

Source = Literal["stages", "blocks"]
Pairs = Literal["all", "last"] | tuple[tuple[int, int], ...]
Stages = Literal["all"] | tuple[int, ...]
Match = Literal["convolution", "pool"]


class Maps:
    """Some maps of one model: their shapes, what the model is asked for, and where its output has them.

    `stages` are the project's: one for each resolution, the last is the map that the head reads. `blocks` are the network's
    own, with equal resolutions, before anything that follows the last of them; that is what most released code reads.
    """

    def __init__(self, facts: ModelFacts, source: Source, indices: tuple[int, ...]) -> None:
        """indices: as of a list, -1 the last; raises ValueError for one that the model lacks."""
        shapes = available(facts, source)
        for index in indices:
            if not -len(shapes) <= index < len(shapes):
                raise ValueError(f"{source[:-1]} {index} does not exist: the model has {len(shapes)} {source}")
        self.source = source
        self.shapes: tuple[MapShape, ...] = tuple(shapes[index] for index in indices)
        # the protocol counts stages from the end and blocks from the front
        shift = {"stages": -len(shapes), "blocks": 0}[source]
        self.indices = tuple(index % len(shapes) + shift for index in indices)
        self.needs = Needs(stages=self.indices) if source == "stages" else Needs(blocks=self.indices)

    def of(self, output: ModelOutput) -> list[Tensor]:
        """The maps [B, C_i, H_i, W_i], in the order asked for."""
        if self.source == "blocks":
            return [output.blocks[index] for index in self.indices]
        # stage -1 is the feature map, which every output has
        return [output.feature_map if index == -1 else output.stages[index] for index in self.indices]


def available(facts: ModelFacts, source: Source) -> tuple[MapShape, ...]:
    """The shapes of a model's stages or blocks; raises ValueError for another source and for a model that has none."""
    if source not in get_args(Source):
        raise ValueError(f"source {source!r} is unknown; choose one of {', '.join(get_args(Source))}")
    shapes = facts.stages if source == "stages" else facts.blocks
    if not shapes:
        raise ValueError(f"compares {source} of both models, and one of them has none; choose a loss on logits")
    return shapes


def paired(student: ModelFacts, teacher: ModelFacts, source: Source, pairs: Pairs) -> tuple[Maps, Maps]:
    """The maps of both models, pair by pair: `all` that both have, from the end, `last`, or (student's, teacher's) indices."""
    common = min(len(available(student, source)), len(available(teacher, source)))
    if pairs == "all":
        pairs = tuple((index, index) for index in range(-1, -common - 1, -1))
    elif pairs == "last":
        pairs = ((-1, -1),)
    elif isinstance(pairs, str) or not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"pairs {pairs!r} must be 'all', 'last' or pairs of a student's and a teacher's map, such as [[-1, -1]]"
        )
    return Maps(student, source, tuple(mine for mine, _ in pairs)), Maps(teacher, source, tuple(theirs for _, theirs in pairs))


def chosen_stages(stages: Stages, student: ModelFacts, teacher: ModelFacts) -> tuple[int, ...]:
    """The stages to compare, by their index from the end, first to last: `all` that both models have, or those named."""
    if stages == "all":
        return tuple(range(-min(len(student.stages), len(teacher.stages)), 0))
    if isinstance(stages, str) or not stages or len(set(stages)) < len(stages) or max(stages) > -1:
        raise ValueError(f"stages {stages!r} must be 'all' or indices from the end, each once, such as [-1, -2]")
    return tuple(sorted(stages))


def to_grid(feature_map: Tensor, height: int, width: int) -> Tensor:
    """Adaptive average pooling of [B, C, H, W] to a smaller grid, in float32 (float64 stays), outside autocast.

    Two products instead of `adaptive_avg_pool2d`, whose backward pass on a GPU adds in any order.
    """
    with no_autocast(feature_map):
        feature_map = full_precision(feature_map)
        if feature_map.shape[-2:] == (height, width):
            return feature_map
        rows = side_on_device(feature_map.shape[-2], height, feature_map.dtype, feature_map.device)
        columns = side_on_device(feature_map.shape[-1], width, feature_map.dtype, feature_map.device)
        return rows @ feature_map @ columns.T


def smaller_grid(first: Tensor, second: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps."""
    return min(first.shape[-2], second.shape[-2]), min(first.shape[-1], second.shape[-1])


@lru_cache(maxsize=256)
def side_on_device(length: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`adaptive_side` on the device, made once: copying it there in every step would make the host wait."""
    with torch.inference_mode(False):  # those made under it cannot be used in training
        return adaptive_side(length, cells).to(device=device, dtype=dtype)
