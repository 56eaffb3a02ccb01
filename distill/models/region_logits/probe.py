"""The check of a mechanism on the model itself: noise in places, and what it moves. Nothing here runs in a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.anatomy import Anatomy, evaluating
from distill.models.region_logits.layout import Features, Layout, TimmModel

LOUD = 3.0
"""Deviation of the noise that shows an activation in a head."""
TOLERANCE = 1e-4
"""Largest difference, relative to the largest logit, between a model's logits and those of its whole-image region."""


@contextmanager
def noisy_head(model: TimmModel, anatomy: Anatomy) -> Iterator[tuple[Features, list[nn.Module]]]:
    """Features with noise added, and the modules of the head, which carry noise of their own inside the block."""
    with evaluating(model):
        with recorded_modules(model) as seen:
            model.forward_head(anatomy.features)
        head = [module for module in model.modules() if module in seen]
        with perturbed(head, anatomy.generator):
            yield with_noise(anatomy, anatomy.features, None), head


def with_noise(anatomy: Anatomy, features: Features, cells: Tensor | None) -> Features:
    """Features with noise of their own size, and never none: everywhere, or on these cells [H * W] of every grid's map only."""
    layout = anatomy.layout
    noisy = []
    for i, (part, tensor) in enumerate(zip(layout.parts, layout.tensors(features), strict=True)):
        noise = noise_like(tensor, anatomy.generator)
        if cells is not None:
            if i != layout.primary:
                noisy.append(tensor)
                continue
            noise = noise * part.from_map(cells_on(layout, cells, part.to_map(tensor)), torch.zeros_like(tensor))
        noisy.append(tensor + noise)
    return layout.features(noisy)


def loud_features(anatomy: Anatomy) -> Features:
    """Features of loud noise alone."""
    layout = anatomy.layout
    return layout.features([loud_like(tensor, anatomy.generator) for tensor in layout.tensors(anatomy.features)])


def loud_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of deviation `LOUD`, whatever the tensor's values are."""
    return LOUD * torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)


def noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise of the tensor's own spread, at least 0.1."""
    noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
    return noise * tensor.std().clamp_min(0.1)


def cells_on(layout: Layout, cells: Tensor, grid: Tensor) -> Tensor:
    """A mask of the shape of the map `grid`, 1 at these cells [H * W]."""
    mask = cells.to(grid.device, grid.dtype).reshape(1, 1, layout.height, layout.width)
    return mask.expand(grid.shape)


def head_reads_grid(model: TimmModel, anatomy: Anatomy, features: Features) -> bool:
    """Whether the head's output changes with the grid; it does not where the head reads class tokens only."""
    layout = anatomy.layout
    if layout.primary is None:
        return False
    moved = with_noise(anatomy, features, torch.ones(layout.height * layout.width))
    return not torch.equal(model.forward_head(moved), model.forward_head(features))


def head_bias_refusal(model: TimmModel, anatomy: Anatomy, trains: bool) -> str:
    """Why the logits of an empty map say nothing; empty where the model's logits are an affine function of the map's mean.

    Looked for once, with noise on the head like a mechanism, then remembered in the anatomy. trains: whether it is a student,
    whose BatchNorms would take the empty map for a batch.
    """
    if "head_bias" not in anatomy.found:
        with noisy_head(model, anatomy) as (features, head):
            norms = any(isinstance(module, _BatchNorm) for module in head)
            anatomy.found["head_bias"] = (_head_bias_refusal(model, anatomy, features), norms)
    refusal, norms = anatomy.found["head_bias"]
    return str(refusal) or ("its head has BatchNorm, which is not affine in training" if norms and trains else "")


def _head_bias_refusal(model: TimmModel, anatomy: Anatomy, features: Features) -> str:
    layout = anatomy.layout
    if layout.primary is None:
        return "its head reads no map"
    index, part = layout.primary, layout.parts[layout.primary]
    grid = layout.map_of(features)
    # an activation is nearly linear at values near 0, and at those of 1e6 that a net with noise on its norms can give
    loud = loud_like(grid, anatomy.generator)

    def mean(grid: Tensor) -> Tensor:
        return grid.mean((2, 3), keepdim=True).expand_as(grid).contiguous()

    def head(grid: Tensor) -> Tensor:
        tensors = [torch.zeros_like(tensor) for tensor in layout.tensors(features)]
        tensors[index] = part.from_map(grid, tensors[index])
        return model.forward_head(layout.features(tensors))

    whole, pooled = [model.forward_head(features), head(loud)], [head(mean(grid)), head(mean(loud))]
    if any(relative_difference(a, b) > TOLERANCE for a, b in zip(pooled, whole, strict=True)):
        return "its head reads more than the mean of the map"
    cell = loud[:, :, :1, :1].expand_as(loud).contiguous()  # not the mean, which is quieter the more cells there are
    if relative_difference(head(2 * cell) + head(0 * cell), 2 * head(cell)) > TOLERANCE:
        return "its logits are no affine function of the map's mean"
    return ""


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `b`; infinite where either is not finite."""
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


@dataclass(frozen=True)
class Verdict:
    """What a check of a mechanism found."""

    difference: float
    """The largest difference of the whole-image region's logits from the model's, relative to the largest logit."""
    reason: str | None
    """Why the mechanism is wrong for the model; None where it holds."""


def check_regions(
    run: Callable[[Features], tuple[Tensor, Tensor]],
    moved: Callable[[Features, Tensor], Features],
    source: Features,
    corner: Tensor,
) -> Verdict:
    """Whether this way to region logits is right for this model.

    run: source -> the model's logits [B, K] and those of the whole image and of one part of it, [B, 2, K]. corner: the row
    [H * W] of that part. moved: (source, mask of cells) -> the source with noise there. It holds where the whole image gives
    the model's logits, noise outside the part leaves its logits alone, and noise inside moves them.
    """
    logits, cells = run(source)
    if logits.ndim != 2 or cells.shape != (len(logits), 2, logits.shape[1]):
        return Verdict(float("inf"), f"its head gives {list(logits.shape[1:])} per image, not one row of logits")
    difference = relative_difference(cells[:, 0], logits)
    if difference > TOLERANCE:
        return Verdict(difference, f"the whole-image region differs from the model's logits by {difference:.1e} relative")
    inside = corner > 0
    if bool(inside.all()):
        return Verdict(difference, None)  # a 1x1 grid has no outside
    outer, inner = (relative_difference(run(moved(source, mask))[1][:, 1], cells[:, 1]) for mask in (~inside, inside))
    if inner < 1e-3:
        return Verdict(difference, "a region's logits do not depend on the region")
    if outer > 1e-5:
        return Verdict(difference, f"a region's logits depend on what is outside it, by {outer:.1e} relative")
    return Verdict(difference, None)


@contextmanager
def recorded_modules(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules of `model` that run inside the block; for build time only, its hooks are gone afterwards."""
    seen: set[nn.Module] = set()

    def note(module: nn.Module, _: object) -> None:
        seen.add(module)

    handles = [module.register_forward_pre_hook(note) for module in model.modules()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def perturbed(modules: Sequence[nn.Module], generator: torch.Generator) -> Iterator[None]:
    """A block in which the parameters and statistics of `modules` carry noise: zero-initialised layers then hide nothing."""
    tensors = {
        id(t): t
        for m in modules
        for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
        if t.is_floating_point() and t.numel()
    }
    own = [t.detach().clone() for t in tensors.values()]
    variances = {id(m.running_var) for m in modules if isinstance(m, _BatchNorm)}
    with torch.no_grad():
        for key, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
            tensor.copy_(tensor * (0.2 * noise).exp() if key in variances else tensor + noise * _spread(tensor))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in zip(tensors.values(), own, strict=True):
                tensor.copy_(values)


def _spread(tensor: Tensor) -> float:
    """Noise of about the size of a usual initialisation: 1 / sqrt(inputs) for weights, 0.1 for scales and biases."""
    inputs = tensor[0].numel() if tensor.ndim else 1
    return inputs**-0.5 if inputs > 1 else 0.1
