"""Any timm model as one module that gives everything the criteria read, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from distill.protocols import InputSpec, ModelOutput, Needs
from distill.regions import pool


class Backbone(nn.Module):
    """A timm model, its own normalisation, and exactly the outputs that `needs` asks for.

    `model` stays a plain timm model without hooks: its state dict and its copies (EMA) are timm's. Attributes:
    `layout` (form and grid of its features), `grid` (h, w), `num_classes`, `input_spec`, `mechanism` (how region logits are
    had; "none" where nobody asks for them), `whole_image_difference` (how exactly, as measured when it was found).

    anatomy: of this model, or of the one that it is a copy of; see `examine`, which also says what the curated stages are.
    class_tokens: the definition of a region's logits where the head reads class tokens only: `attend`, `shift` or `repeat`, see
    `mechanisms` and `attend`; it is `shift` where the last block is not one that `attend` knows, with a warning.
    class_map: for each class of the data the model's own class; logits and region logits are reordered so. None: as they are.
    frozen: a teacher. Its parameters take no gradient and it stays in evaluation mode whatever `train()` says.
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
        self.stage_indices = _wanted_stages(needs, anatomy)
        self.plan: RegionPlan = plan_regions(needs, self.grid)
        self.region_head: nn.Module | None = None
        self.head_norms: list[str] = []
        self.whole_image_difference: float | None = None
        if needs.region_logits:
            found = find_mechanism(model, anatomy, class_tokens)
            self.region_head = found.make([self.plan.origins[row] for row in self.plan.through_head] or CHECKED)
            self.head_norms, self.whole_image_difference = found.head_norms, found.difference
        self.mechanism = "none" if self.region_head is None else str(self.region_head.kind)
        self._constants(self.input_spec)
        if frozen:
            self.requires_grad_(False)
        self.to(next(model.parameters()).device)
        self.train(self.training)

    def _constants(self, spec: InputSpec) -> None:
        """What moves with the module to its device and is no part of its state."""
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

    def serving(self, needs: Needs, model: TimmModel | None = None) -> Backbone:
        """A backbone like this one that gives what `needs` asks, over the same weights or over those of `model`, its copy."""
        options: dict[str, Any] = {"frozen": self.frozen, "class_tokens": self.class_tokens, "class_map": self.class_map}
        return Backbone(self.model if model is None else model, self.anatomy, needs, **options)

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
        features, feature_map, stages, inner = self._trunk(self._prepare(images))
        rows = self._rows(feature_map)
        logits, cells = self._head(features, feature_map, take(rows, self.plan.through_head, self.head_rows_0), inner)
        region_features = {
            regions: take(rows, positions, self.get_buffer(f"features_rows_{i}"))
            for i, (regions, positions) in enumerate(self.plan.features.items())
        }
        region_logits = {
            regions: take(cells, positions, self.get_buffer(f"logits_rows_{i}"))
            for i, (regions, positions) in enumerate(self.plan.logits.items())
        }
        return ModelOutput(logits, feature_map, region_logits, region_features, {**stages, **self._last_stage(feature_map)})

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

    def _trunk(self, images: Tensor) -> tuple[Features, Tensor, dict[int, Tensor], Tensor | None]:
        """Normalised images -> what the head reads, the feature map, the stages before it that are asked for, and the input
        of the last block where region logits are made from it."""
        layout = self.layout
        if isinstance(self.region_head, AttendHead):
            features, inner = last_block_input(self.model, images)
            return features, layout.parts[0].to_map(features), {}, inner
        wanted = sorted({*self.stage_indices.values(), *([] if layout.stand_in is None else [layout.stand_in])})
        if wanted:
            features, found = self.model.forward_intermediates(images, indices=wanted, stop_early=False, output_fmt="NCHW")
            maps = dict(zip(wanted, found, strict=True))
        else:
            features, maps = self.model.forward_features(images), {}
        feature_map = maps[layout.stand_in] if layout.stand_in is not None else layout.map_of(features)
        return features, feature_map, {stage: maps[index] for stage, index in self.stage_indices.items()}, None

    def _rows(self, feature_map: Tensor) -> Tensor:
        """Every distinct region, float32 [B, U, C]; no copy of the map in float32 where nobody asks for regions."""
        if not self.plan.origins:
            return feature_map.new_zeros(len(feature_map), 0, self.layout.channels, dtype=torch.float32)
        return pool(feature_map, self.region_matrix)

    def _last_stage(self, feature_map: Tensor) -> dict[int, Tensor]:
        return {-1: feature_map} if -1 in self.needs.stages else {}

    def _head(self, features: Features, feature_map: Tensor, rows: Tensor, inner: Tensor | None) -> tuple[Tensor, Tensor]:
        """The model's own logits [B, K], and with them in front those of the regions, [B, 1 + R, K]."""
        if self.region_head is None or not self.plan.through_head:
            logits = self._of_the_data(self.model.forward_head(features))
            return logits, logits[:, None]
        norms = training_batchnorms([self.model.get_submodule(name) for name in self.head_norms])
        before = snapshot(norms)
        if isinstance(self.region_head, SplitHead):
            logits, inner = self.region_head.first(self.model, features)
        else:
            logits = self.model.forward_head(features)
        with normalised_by(norms, region_statistics(norms, before, len(logits))):
            cells = self.region_head(self.model, Sight(features, rows, feature_map, logits, inner))
        together = self._of_the_data(torch.cat([logits[:, None], cells.to(logits.dtype)], dim=1))
        return (logits if self.class_index is None else together[:, 0]), together

    def _of_the_data(self, logits: Tensor) -> Tensor:
        """The model's classes [..., K'] in the order of the data's [..., K]."""
        return logits if self.class_index is None else logits.index_select(-1, self.class_index)


def _check_keeps_tokens(name: str, model: TimmModel) -> None:
    """ValueError for a student that drops tokens in training, so that no grid is left."""
    rates = [module.prob for module in model.modules() if isinstance(module, PatchDropout) and module.prob > 0]
    if rates:
        raise ValueError(f"patch_drop_rate {rates[0]}: {name} drops tokens in training and has no grid then; leave it out")


def _wanted_stages(needs: Needs, anatomy: Anatomy) -> dict[int, int]:
    """Stage, counted from the end, -> index for `forward_intermediates`; without -1, which is the feature map."""
    count = len(anatomy.facts.stages)
    for stage in needs.stages:
        if not -count <= stage <= -1:
            raise ValueError(f"stage {stage}: {anatomy.name} has {count} stages; ask for -1 to -{count}")
    return {stage: anatomy.stage_indices[count + stage] for stage in needs.stages if stage != -1}
