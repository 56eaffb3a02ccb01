"""A forward pass cut in two: the trunk up to the means that its head reads, and the head alone on such means.

A cell is one row of weights over the feature map's grid; its value is the map's mean under these weights. Heads that read
nothing but means (`pool`, and `split` after their first layers) give the same logits on cells as on the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.models.backbone import Backbone
from distill.models.region_logits.mechanisms import PoolHead, Sight, SplitHead
from distill.models.region_logits.plan import plan_regions
from distill.models.taps import tapped
from distill.protocols import ModelOutput, Needs, Regions
from distill.regions import pool, region_matrix

Grid = tuple[int, int]
CLOSE = 1e-6
"""Largest error of a weight for which a region is taken for a mean of cells; a region's own weights are at least 1/H/W."""


def headed_rows(needs: Needs, grid: Grid) -> Tensor:
    """float64 [1 + T, H * W]: the whole image, then each region that the head has to see, in the order of the region plan."""
    plan = plan_regions(needs, grid)
    return torch.cat([_whole(grid), plan.matrix[list(plan.through_head)].double()])


def cell_rows(regions: Sequence[Regions], grid: Grid) -> Tensor:
    """float64 [N, H * W]: the fewest of these regions, and of the whole image, whose means give all the others.

    Of an area pyramid they are the cells of its finest scale. A region that no mean of others gives (overlapping windows, a
    scale that does not divide another) is kept as it is: differences of stored numbers would multiply their rounding.
    """
    rows = torch.cat([_whole(grid), *(region_matrix(*grid, each) for each in regions)])
    finest_first = sorted(range(len(rows)), key=lambda i: int((rows[i] > 0).sum()))
    kept: list[Tensor] = []
    for row in (rows[i] for i in finest_first):
        if not kept or _means(torch.stack(kept), row[None]) is None:
            kept.append(row)
    return torch.stack(kept)


def means_of(stored: Tensor, wanted: Tensor) -> Tensor:
    """float32 [R, N]: the shares of the `stored` cells [N, H * W] that give each `wanted` row [R, H * W].

    ValueError where one of them is no mean of the cells.
    """
    found = _means(stored, wanted)
    if found is None:
        raise ValueError("a region that is asked for is no mean of the stored cells")
    return found.float()


def places_of(stored: Tensor, wanted: Tensor) -> list[int]:
    """The place of each `wanted` row among the `stored` ones. ValueError where one is not there."""
    apart = (wanted[:, None] - stored[None]).abs().amax(2)
    if bool((apart.amin(1) > CLOSE).any()):
        raise ValueError("a region that is asked for is none of the stored ones")
    return apart.argmin(1).tolist()


def _whole(grid: Grid) -> Tensor:
    return torch.full((1, grid[0] * grid[1]), 1 / (grid[0] * grid[1]), dtype=torch.float64)


def _means(stored: Tensor, wanted: Tensor) -> Tensor | None:
    """The shares, none of them negative; None where there are none."""
    from scipy.optimize import nnls  # an extra of the commands, which alone come here

    found = [nnls(stored.T.numpy(), row.numpy()) for row in wanted]
    if any(residual > CLOSE for _, residual in found):
        return None
    return torch.stack([torch.from_numpy(shares) for shares, _ in found])


def cells_refusal(backbone: Backbone) -> str:
    """The reason why this model's head cannot be run on cells; empty where it can."""
    if not isinstance(backbone.region_head, (PoolHead, SplitHead)) or backbone.mechanism not in ("pool", "split"):
        return f"its head reads more than means of its map (mechanism {backbone.mechanism})"
    layout = backbone.layout
    if layout.several or layout.primary is None or layout.parts[layout.primary].prefix:
        return "its head reads more than one map"
    if isinstance(backbone.region_head, SplitHead) and backbone.plan.features:
        return "its head takes means of another map than the one whose region features are asked for"
    return ""


class CellTrunk(nn.Module):
    """Images -> cells: float32 [B, N, C] of the map that the head takes its mean of."""

    cells: Tensor

    def __init__(self, backbone: Backbone, cells: Tensor) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("cells", cells.float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images float [B, 3, H, W] in [0, 1], as `Backbone.forward` takes them."""
        backbone = self.backbone
        trunk = backbone._trunk(backbone._prepare(images))
        if isinstance(backbone.region_head, SplitHead):
            _, read = backbone.region_head.first(backbone.model, trunk.features)
            return pool(read, self.cells)
        return pool(trunk.feature_map, self.cells)


class CellHead(nn.Module):
    """Cells -> what the backbone's needs ask for, by the model's own head, which stays live.

    The output has no feature map, stages, pre-activations or blocks.
    """

    shares: Tensor
    feature_shares: Tensor

    def __init__(self, backbone: Backbone, cells: Tensor) -> None:
        """cells: float64 [N, H * W] that `forward` is given the values of. ValueError where they do not give the regions,
        and where the head cannot be run on cells."""
        super().__init__()
        if refusal := cells_refusal(backbone):
            raise ValueError(refusal)
        self.backbone = backbone
        device = next(backbone.parameters()).device
        rows = headed_rows(backbone.needs, backbone.grid)
        self.register_buffer("shares", means_of(cells, rows).to(device), persistent=False)
        features = means_of(cells, backbone.plan.matrix.double()) if len(backbone.plan.matrix) else torch.zeros(0, len(cells))
        self.register_buffer("feature_shares", features.to(device), persistent=False)
        head = backbone.region_head
        if isinstance(head, SplitHead):  # its matrix takes means of a map; here the rows are means already
            head = SplitHead(torch.eye(len(rows)), head.tap.name, 2 + len(head.trailing)).to(device)
        self.head = head

    def forward(self, cells: Tensor) -> ModelOutput:
        """cells float32 [B, N, C]."""
        backbone = self.backbone
        as_map = cells.transpose(1, 2)[..., None]  # cells are the places of a map, and regions are means over it
        rows, features = pool(as_map, self.shares), pool(as_map, self.feature_shares)
        with tapped(backbone.model, backbone.head_taps):
            own = self._head(rows)
        embedding = backbone.head_taps[0].taken() if backbone.head_taps else None
        if embedding is not None:
            embedding = embedding.flatten(1).unflatten(0, rows.shape[:2])[:, 0]
        bias = backbone._head_bias(self._placeholder(rows)) if backbone.needs.head_bias else None
        return assembled(backbone, backbone._of_the_data(own), features, embedding, bias)

    def _placeholder(self, rows: Tensor) -> Tensor:
        """Features of the probe's noise: heads are given them for their form alone."""
        features: Tensor = self.backbone.anatomy.features
        return features.to(rows.device)

    def _head(self, rows: Tensor) -> Tensor:
        """Logits [B, R, K] of each row [B, R, C], by the model's own classes."""
        as_map = rows.transpose(1, 2)[..., None]
        assert self.head is not None
        logits: Tensor = self.head(self.backbone.model, Sight(self._placeholder(rows), rows, as_map, rows, as_map))
        return logits


def assembled(
    backbone: Backbone,
    logits: Tensor,
    features: Tensor,
    embedding: Tensor | None = None,
    bias: Tensor | None = None,
) -> ModelOutput:
    """The output of a backbone from logits [B, 1 + T, K] of the rows of `headed_rows`, in the order of the data's classes, and
    from its plan's distinct rows `features` [B, U, C], which need not be there where nobody asks for them."""
    plan = backbone.plan
    return ModelOutput(
        logits=logits[:, 0],
        feature_map=None,  # type: ignore[arg-type]  # a criterion that reads it is told so by name
        region_logits={regions: logits[:, list(places)] for regions, places in plan.logits.items()},
        region_features={regions: features[:, list(rows)] for regions, rows in plan.features.items()},
        stages={},
        embedding=embedding,
        head_bias=bias,
    )


def headed_logits(backbone: Backbone, output: ModelOutput) -> Tensor:
    """[B, 1 + T, K]: the logits of the rows of `headed_rows`, out of what the backbone gave."""
    found = {0: output.logits}
    for regions, places in backbone.plan.logits.items():
        for number, place in enumerate(places):
            found.setdefault(place, output.region_logits[regions][:, number])
    return torch.stack([found[place] for place in range(len(found))], dim=1)


def forget_trunk(backbone: Backbone, keep_head: bool) -> int:
    """Gives back the memory of every parameter and buffer of the model that its head does not use; the bytes.

    The model's forward pass fails from then on, and that of its head too unless it is kept.
    """
    model, used = backbone.model, {backbone.model}
    if keep_head:
        handles = [module.register_forward_hook(lambda module, *_: used.add(module)) for module in model.modules()]
        try:
            with torch.no_grad():
                model.forward_head(backbone.anatomy.features.to(backbone.mean.device))
        finally:
            for handle in handles:
                handle.remove()
    freed = 0
    for module in (each for each in model.modules() if each not in used):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            freed += tensor.nbytes
            tensor.data = tensor.data.new_empty(0)
    return freed
