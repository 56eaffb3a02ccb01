"""Any timm model as one module that gives everything the criteria read, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.anatomy import Anatomy
from distill.models.region_logits.attend import AttendHead
from distill.models.region_logits.find import CHECKED, find_mechanism, last_block_input
from distill.models.region_logits.head_batchnorm import normalised_by, region_statistics, snapshot, training_batchnorms
from distill.models.region_logits.layout import Features, TimmModel
from distill.models.region_logits.mechanisms import Sight, SplitHead
from distill.models.region_logits.plan import RegionPlan, plan_regions, take
from distill.models.region_logits.probe import head_bias_refusal
from distill.models.taps import Tap, tapped
from distill.protocols import InputSpec, ModelOutput, Needs
from distill.regions import pool


class Trunk(NamedTuple):
    """What a model gives before its head."""

    features: Features
    """What the head reads."""
    feature_map: Tensor
    maps: dict[int, Tensor]
    """[B, C, H, W], by their index for `forward_intermediates`."""
    inner: Tensor | None = None
    """The input of the last block, where region logits are made from it."""


class Backbone(nn.Module):
    """A timm model, its own normalisation, and exactly the outputs that `needs` asks for.

    `model` stays a plain timm model without hooks: its state dict and its copies (EMA) are timm's. Attributes:
    `layout` (form and grid of its features), `grid` (h, w), `num_classes`, `input_spec`, `mechanism` (how region logits are
    had; "none" where nobody asks for them), `whole_image_difference` (how exactly, as measured when it was found).

    anatomy: of this model, or of the one that it is a copy of; see `examine`. `curate` says which maps are stages.
    class_tokens: the definition of a region's logits where the head reads class tokens only: `attend`, `shift` or `repeat`, see
    `mechanisms` and `attend`; it is `shift` where the last block is not one that `attend` knows, with a warning.
    class_map: for each class of the data the model's own class; logits and region logits are reordered so. None: as they are.
    frozen: a teacher. Its parameters take no gradient and it stays in evaluation mode whatever `train()` says.
    A model without a classifier (`num_classes` 0) gives empty logits [B, 0], no region logits and no head bias. Its embedding
    is what its head gives, which is what the classifier that it lacks would read.
    ValueError where `needs` asks for what this model cannot give, with the reason and what still works.
    """

    model: TimmModel
    mean: Tensor
    std: Tensor
    region_matrix: Tensor
    head_rows_0: Tensor
    class_index: Tensor | None

    def __init__(
        self,
        model: TimmModel,
        anatomy: Anatomy,
        needs: Needs,
        *,
        frozen: bool = False,
        class_tokens: str = "attend",
        class_map: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.anatomy, self.needs = model, anatomy, needs
        self.name, self.input_spec, self.layout = anatomy.name, anatomy.input_spec, anatomy.layout
        self.frozen, self.class_tokens, self.class_map = frozen, class_tokens, class_map
        self.batchnorm_frozen = False
        self.num_classes = anatomy.facts.num_classes if class_map is None else len(class_map)
        self.grid = (self.layout.height, self.layout.width)
        if not frozen:
            _check_keeps_tokens(self.name, model)
        _check_classifier(needs, anatomy)
        self.map_indices = _wanted_maps(needs, anatomy)
        self.taps = _wanted_taps(needs, anatomy)
        _check_embedding(needs, anatomy)
        self.head_taps = [anatomy.classifier.tap()] if needs.embedding and anatomy.classifier.name else []
        if needs.head_bias:
            _check_head_bias(model, anatomy, not frozen)
        self.plan: RegionPlan = plan_regions(needs, self.grid)
        self.region_head: nn.Module | None = None
        self.head_norms: list[str] = []
        self.whole_image_difference: float | None = None
        if needs.region_logits:
            found = find_mechanism(model, anatomy, class_tokens)
            self.region_head = found.make([self.plan.origins[row] for row in self.plan.through_head] or CHECKED)
            self.head_norms, self.whole_image_difference = found.head_norms, found.difference
        self.mechanism = "none" if self.region_head is None else str(self.region_head.kind)
        self._constants()
        if frozen:
            self.requires_grad_(False)
        self.to(next(model.parameters()).device)
        self.train(self.training)

    def _constants(self) -> None:
        """Registers what moves with the module to its device and is no part of its state."""
        spec = self.input_spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("region_matrix", self.plan.matrix, persistent=False)
        index = None if self.class_map is None else torch.tensor(self.class_map)
        self.register_buffer("class_index", index, persistent=False)
        tables = {
            "features": list(self.plan.features.values()),
            "logits": list(self.plan.logits.values()),
            "head": [self.plan.through_head],
        }
        for kind, table in tables.items():
            for number, positions in enumerate(table):
                self.register_buffer(f"{kind}_rows_{number}", torch.tensor(positions, dtype=torch.long), persistent=False)

    def serving(self, needs: Needs, model: TimmModel | None = None, input_spec: InputSpec | None = None) -> Backbone:
        """A backbone like this one that gives what `needs` asks, over the same weights or over those of `model`, its copy.

        input_spec: that of its images, where it is not this one's; its size only for needs without maps or regions.
        """
        options: dict[str, Any] = {"frozen": self.frozen, "class_tokens": self.class_tokens, "class_map": self.class_map}
        anatomy = self.anatomy
        if input_spec is not None and input_spec != anatomy.input_spec:
            anatomy = replace(anatomy, input_spec=input_spec)
        return Backbone(self.model if model is None else model, anatomy, needs, **options)

    def train(self, mode: bool = True) -> Backbone:
        """Training or evaluation mode; a frozen backbone evaluates always, frozen BatchNorms too."""
        super().train(mode and not self.frozen)
        if self.batchnorm_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> ModelOutput:
        """images float [B, 3, H, W] in [0, 1], any memory format -> what `needs` asks for.

        Images of another size than the model's are resized with antialiasing. Under autocast the model runs in its dtype;
        resizing, normalisation and pooling are float32.
        """
        with tapped(self.model, list(self.taps.values())):
            trunk = self._trunk(self._prepare(images))
        rows = self._rows(trunk.feature_map)
        logits, cells = self._head(trunk, take(rows, self.plan.through_head, self.head_rows_0))
        needs = self.needs
        return ModelOutput(
            logits=logits,
            feature_map=trunk.feature_map,
            region_logits={
                regions: take(cells, positions, self.get_buffer(f"logits_rows_{i}"))
                for i, (regions, positions) in enumerate(self.plan.logits.items())
            },
            region_features={
                regions: take(rows, positions, self.get_buffer(f"features_rows_{i}"))
                for i, (regions, positions) in enumerate(self.plan.features.items())
            },
            stages={stage: self._stage(trunk, stage) for stage in needs.stages},
            preactivations={stage: self._preactivation(trunk, stage) for stage in needs.preactivations},
            blocks={block: trunk.maps[block % len(self.anatomy.facts.blocks)] for block in needs.blocks},
            embedding=self._embedding(trunk) if needs.embedding else None,
            head_bias=self._head_bias(trunk.features) if needs.head_bias else None,
        )

    def _prepare(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> this model's size and normalisation, in float32, keeping the memory format."""
        spec = self.input_spec
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if images.shape[-2:] != (spec.height, spec.width):
                size = (spec.height, spec.width)
                images = F.interpolate(images, size, mode=spec.interpolation, align_corners=False, antialias=True)
                if spec.interpolation == "bicubic":
                    images = images.clamp(0, 1)  # bicubic overshoots at edges; a resized picture is clipped as well
            return (images - self.mean) / self.std

    def _trunk(self, images: Tensor) -> Trunk:
        """Normalised images -> what comes before the head, with the maps of `map_indices`."""
        layout = self.layout
        if isinstance(self.region_head, AttendHead):
            features, inner, tokens = last_block_input(self.model, images, self.map_indices)
            maps = {index: each.transpose(1, 2).unflatten(2, self.grid) for index, each in tokens.items()}
            return Trunk(features, layout.map_of(features), maps, inner)
        if not self.map_indices:
            features = self.model.forward_features(images)
            return Trunk(features, layout.map_of(features), {})
        features, found = self.model.forward_intermediates(
            images, indices=self.map_indices, stop_early=False, output_fmt="NCHW"
        )
        maps = dict(zip(self.map_indices, found, strict=True))
        return Trunk(features, layout.map_of(features) if layout.stand_in is None else maps[layout.stand_in], maps)

    def _stage(self, trunk: Trunk, stage: int) -> Tensor:
        """The map of a stage, counted from the end."""
        return trunk.feature_map if stage == -1 else trunk.maps[self.anatomy.stage_indices[stage + 1]]

    def _preactivation(self, trunk: Trunk, stage: int) -> Tensor:
        """What came before the activation that ends a stage; its own map where none does."""
        if stage not in self.taps:
            return self._stage(trunk, stage)
        kept, pooling = self.taps[stage].taken(), self.anatomy.preactivations[stage].pool
        pooled: Tensor = self.model.get_submodule(pooling)(kept) if pooling else kept
        return pooled

    def _embedding(self, trunk: Trunk) -> Tensor:
        """[B, D]: what the classifier has read, or what a head without one gives."""
        read = self.head_taps[0].taken() if self.head_taps else self.model.forward_head(trunk.features)
        return read.flatten(1)

    def _rows(self, feature_map: Tensor) -> Tensor:
        """Every distinct region, float32 [B, U, C]; no copy of the map in float32 where nobody asks for regions."""
        if not self.plan.origins:
            return feature_map.new_zeros(len(feature_map), 0, self.layout.channels, dtype=torch.float32)
        return pool(feature_map, self.region_matrix)

    def _head(self, trunk: Trunk, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own logits [B, K], and with them in front those of the regions, [B, 1 + R, K]."""
        if self.region_head is None or not self.plan.through_head:
            logits = self._of_the_data(self._logits(trunk)[0])
            return logits, logits[:, None]
        norms = training_batchnorms([self.model.get_submodule(name) for name in self.head_norms])
        before = snapshot(norms)
        logits, inner = self._logits(trunk)
        with normalised_by(norms, region_statistics(norms, before, len(logits))):
            cells = self.region_head(self.model, Sight(trunk.features, rows, trunk.feature_map, logits, inner))
        together = self._of_the_data(torch.cat([logits[:, None], cells.to(logits.dtype)], dim=1))
        return (logits if self.class_index is None else together[:, 0]), together

    def _logits(self, trunk: Trunk) -> tuple[Tensor, Tensor | None]:
        """The model's own logits by its own classes, and what the way to region logits reads beside the features."""
        if self.anatomy.facts.num_classes < 1:
            return trunk.feature_map.new_empty(len(trunk.feature_map), 0), None
        with tapped(self.model, self.head_taps):
            if isinstance(self.region_head, SplitHead):
                return self.region_head.first(self.model, trunk.features)
            return self.model.forward_head(trunk.features), trunk.inner

    def _head_bias(self, features: Features) -> Tensor:
        """The logits of an empty map, [K]."""
        empty = [tensor.new_zeros((1, *tensor.shape[1:])) for tensor in self.layout.tensors(features)]
        return self._of_the_data(self.model.forward_head(self.layout.features(empty)))[0]

    def _of_the_data(self, logits: Tensor) -> Tensor:
        """The model's classes [..., K'] in the order of the data's [..., K]."""
        return logits if self.class_index is None else logits.index_select(-1, self.class_index)


def _check_keeps_tokens(name: str, model: TimmModel) -> None:
    """ValueError for a student that drops tokens in training, so that no grid is left."""
    rates = [module.prob for module in model.modules() if isinstance(module, PatchDropout) and module.prob > 0]
    if rates:
        raise ValueError(f"patch_drop_rate {rates[0]}: {name} drops tokens in training and has no grid then; leave it out")


def _wanted_maps(needs: Needs, anatomy: Anatomy) -> list[int]:
    """Indices for `forward_intermediates` of every map that is asked for and is not the feature map, sorted."""
    name, stages, blocks = anatomy.name, len(anatomy.facts.stages), len(anatomy.facts.blocks)
    for stage in (*needs.stages, *needs.preactivations):
        if not -stages <= stage <= -1:
            raise ValueError(f"stage {stage}: {name} has {stages} stages; ask for -1 to -{stages}")
    for block in needs.blocks:
        if not -blocks <= block < blocks:
            raise ValueError(f"block {block}: {name} has {blocks} blocks; ask for 0 to {blocks - 1}, or -1 to -{blocks}")
    own_maps = [stage for stage in needs.preactivations if not anatomy.preactivations[stage].name]
    wanted = {anatomy.stage_indices[stage + 1] for stage in (*needs.stages, *own_maps) if stage != -1}
    wanted |= {block % blocks for block in needs.blocks}
    return sorted(wanted if anatomy.layout.stand_in is None else wanted | {anatomy.layout.stand_in})


def _wanted_taps(needs: Needs, anatomy: Anatomy) -> dict[int, Tap]:
    """A tap for each pre-activation that is not the stage's own map."""
    found = {stage: anatomy.preactivations[stage] for stage in needs.preactivations}
    for stage, each in found.items():
        if each.refusal:
            raise ValueError(
                f"{anatomy.name} cannot give the pre-activation of stage {stage}: {each.refusal}; take a loss that reads stages"
            )
    return {stage: each.tap() for stage, each in found.items() if each.name}


def _check_classifier(needs: Needs, anatomy: Anatomy) -> None:
    """ValueError where a model without a classifier is asked for what only a classifier gives."""
    asked = {"logits": needs.logits, "region logits": needs.region_logits, "the bias of its head": needs.head_bias}
    wanted = " and ".join(name for name, wanted in asked.items() if wanted)
    if wanted and anatomy.facts.num_classes < 1:
        raise ValueError(
            f"{anatomy.name} has no classifier (num_classes 0) and cannot give {wanted}; take a loss that reads feature maps "
            "or embeddings (pipelines/pairs.py explain names them), or weights with a classifier"
        )


def _check_embedding(needs: Needs, anatomy: Anatomy) -> None:
    """ValueError, with the reason, where a model is asked for an embedding that it has not."""
    if needs.embedding and anatomy.classifier.refusal:
        raise ValueError(
            f"{anatomy.name} cannot give an embedding: {anatomy.classifier.refusal}; take a loss that reads logits or maps"
        )


def _check_head_bias(model: TimmModel, anatomy: Anatomy, trains: bool) -> None:
    """ValueError, with the reason, where the logits of an empty map say nothing."""
    refusal = head_bias_refusal(model, anatomy, trains)
    if refusal:
        raise ValueError(f"{anatomy.name} cannot give the bias of its head: {refusal}; take a loss that does not need it")
