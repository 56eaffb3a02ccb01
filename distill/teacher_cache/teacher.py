"""The teacher on both sides of a cache: what records its outputs, and what gives them back in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.models.cells import (
    CellHead,
    CellTrunk,
    assembled,
    cell_rows,
    cells_refusal,
    forget_trunk,
    headed_logits,
    headed_rows,
    places_of,
)
from distill.models.teacher import FrozenTeacher
from distill.protocols import Batch, ModelOutput, Needs, Regions
from distill.teacher_cache.codecs import Codec, CodecName, TopKCodec, codec_of
from distill.teacher_cache.files import TeacherCache

WHOLE = Regions(scales=(1,))


def asked_regions(needs: Needs) -> list[Regions]:
    """The regions, without the whole image, which is always there."""
    return [each for each in dict.fromkeys((*needs.region_logits, *needs.region_features)) if each != WHOLE]


def codec_facts(name: CodecName, teacher: FrozenTeacher, dtype: str, k: int) -> dict[str, Any]:
    """What a manifest says of the codec for what this teacher's needs ask. ValueError where the model or `k` forbids it."""
    backbone = teacher.backbone
    regions = asked_regions(backbone.needs)
    if name == "topk":
        codec: Codec = TopKCodec(len(_logit_rows(regions, backbone)), backbone.num_classes, k)
        return codec.facts
    if refusal := cells_refusal(backbone):
        raise ValueError(f"{backbone.name} cannot be cached as features: {refusal}; take --codec topk")
    probe = CellTrunk(backbone, cell_rows(regions, backbone.grid)).to(backbone.mean.device)
    with torch.no_grad(), teacher.autocast(backbone.mean.device):
        spec = backbone.input_spec
        shape = probe(torch.zeros(1, 3, spec.height, spec.width, device=backbone.mean.device)).shape
    return codec_of({"name": name, "cells": shape[1], "channels": shape[2], "dtype": dtype}).facts


class Recorder:
    """Images -> rows of a cache, by the whole teacher."""

    def __init__(self, teacher: FrozenTeacher, codec: Codec, regions: Sequence[Regions]) -> None:
        self.teacher, self.codec = teacher, codec
        backbone = teacher.backbone
        self.trunk: nn.Module | None = None
        if codec.facts["name"] == "features":
            self.trunk = CellTrunk(backbone, cell_rows(regions, backbone.grid)).to(backbone.mean.device)
        else:
            self.teacher = teacher.serving(Needs(region_logits=(*regions, WHOLE)))

    def record(self, images: Tensor, labels: Tensor) -> NDArray[np.void]:
        """[B] rows, of images as `Backbone.forward` takes them. Waits for the device."""
        return self.codec.pack(self.values(images), labels)

    @torch.no_grad()
    def values(self, images: Tensor) -> Tensor:
        """[B, N, C]: what the codec packs, on the device."""
        if self.trunk is None:
            return headed_logits(self.teacher.backbone, self.teacher(images))
        with self.teacher.autocast(images.device):
            found: Tensor = self.trunk(images.contiguous(memory_format=self.teacher.memory_format))
        return found


class CachedTeacher(nn.Module):
    """A teacher whose trunk was run once, ahead: it unpacks the rows that the loader brought, and runs the head, where one is
    needed. ValueError where the cache has not the regions that the teacher's needs ask for."""

    def __init__(self, teacher: FrozenTeacher, cache: TeacherCache) -> None:
        super().__init__()
        self.teacher, self.codec, self.identity = teacher, cache.codec, cache.identity
        backbone = teacher.backbone
        regions = regions_of(cache.facts)
        self.head: CellHead | None = None
        self.places: list[int] = []
        if self.codec.facts["name"] == "features":
            self.head = CellHead(backbone, cell_rows(regions, backbone.grid))
        else:
            self.places = places_of(_logit_rows(regions, backbone), headed_rows(backbone.needs, backbone.grid))

    def forward(self, images: Tensor, batch: Batch) -> ModelOutput:
        """What the teacher's needs ask for, from the batch's rows; the images are not read."""
        assert batch.teacher is not None, "the loader brings the rows"
        values = self.codec.unpack(batch.teacher, batch.labels)
        if self.head is None:
            return assembled(self.teacher.backbone, values[:, self.places], values[:, :0])
        with self.teacher.autocast(values.device):
            output: ModelOutput = self.head(values)
        return output

    def join(self) -> None:
        """Nothing: it works on the caller's stream."""

    def forget_trunk(self) -> int:
        """Gives back the memory of all that is not needed any more; the bytes. The live teacher cannot be called after it."""
        with self.teacher.autocast(self.teacher.backbone.mean.device):
            return forget_trunk(self.teacher.backbone, keep_head=self.head is not None)

    @torch.no_grad()
    def both_logits(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, 1 + T, K] of the whole image and of every region, as the live teacher gives them now and as the cache has
        them. Of `topk`, the live ones go through the codec too: what it leaves out is no difference."""
        backbone = self.teacher.backbone
        live = headed_logits(backbone, self.teacher(images)).float()
        self.teacher.join()
        if isinstance(self.codec, TopKCodec):
            codec = TopKCodec(live.shape[1], live.shape[2], self.codec.k)
            rows = codec.pack(live, batch.labels).view(np.uint8).reshape(len(live), -1)
            live = codec.unpack(torch.from_numpy(rows).to(live.device), batch.labels)
        return live, headed_logits(backbone, self(images, batch)).float()


def regions_of(facts: Mapping[str, Any]) -> list[Regions]:
    """The regions that a manifest lists."""
    return [Regions(tuple(r["scales"]), r["mode"], tuple(r["windows"]), r["stride"]) for r in facts["regions"]]


def _logit_rows(regions: Sequence[Regions], backbone: Backbone) -> Tensor:
    """The rows whose logits `topk` keeps; in the order of `headed_logits`."""
    return headed_rows(Needs(region_logits=(*regions, WHOLE)), backbone.grid)
