"""The search for the mechanism that gives a model's region logits: tried on the model itself, never looked up by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.models.anatomy import Anatomy
from distill.models.region_logits.attend import AttendHead
from distill.models.region_logits.layout import Features, Layout, TimmModel
from distill.models.region_logits.mechanisms import (
    CLASS_TOKEN_MODES,
    ClassTokenHead,
    CropHead,
    PoolHead,
    Sight,
    SplitHead,
)
from distill.models.region_logits.plan import rows_on
from distill.models.region_logits.probe import (
    Verdict,
    cells_on,
    check_regions,
    head_reads_grid,
    loud_features,
    noise_like,
    noisy_head,
    perturbed,
    relative_difference,
    with_noise,
)
from distill.protocols import Regions
from distill.regions import pool

logger = logging.getLogger(__name__)
DEFINED = "%s reads class tokens: its regions' logits are defined by '%s', which no paper does"

Origins = Sequence[tuple[Regions, int]]
Factory = Callable[[Origins], nn.Module]

CHECKED: Origins = ((Regions(scales=(1,), mode="area"), 0), (Regions(scales=(2,), mode="area"), 0))
"""The whole image and its first quarter: what a mechanism is checked on."""


@dataclass(frozen=True)
class Found:
    """A mechanism that holds for a model."""

    make: Factory
    """Regions -> the module (model, sight) -> their logits."""
    head_norms: list[str]
    """Names of the BatchNorms inside the model's head."""
    difference: float | None
    """The relative one of the whole-image region's logits from the model's; None for a definition that is not of the region."""


def find_mechanism(model: TimmModel, anatomy: Anatomy, class_tokens: str) -> Found:
    """The mechanism that gives this model's region logits; looked for once, then remembered in the anatomy.

    class_tokens: the definition for heads that never read the grid, see `mechanisms` and `attend`. The head runs under noise
    meanwhile, so the model must be in float32 and not compiled when this is first called. ValueError with each mechanism's
    reason where none holds, which is remembered too.
    """
    if class_tokens not in CLASS_TOKEN_MODES:
        raise ValueError(f"class_tokens {class_tokens!r}: no such definition; choose one of {', '.join(CLASS_TOKEN_MODES)}")
    if class_tokens not in anatomy.found:
        with noisy_head(model, anatomy) as (features, head):
            names = [n for n, module in model.named_modules() if module in head and isinstance(module, _BatchNorm)]
            try:
                if head_reads_grid(model, anatomy, features):
                    factory, difference = _grid_factory(model, anatomy, features, head)
                else:
                    factory, difference = _class_token_factory(model, anatomy, class_tokens)
                anatomy.found[class_tokens] = Found(factory, names, difference)
            except ValueError as error:
                anatomy.found[class_tokens] = str(error)
    found: Found | str = anatomy.found[class_tokens]
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _grid_factory(
    model: TimmModel, anatomy: Anatomy, features: Features, head: Sequence[nn.Module]
) -> tuple[Factory, float | None]:
    """`pool`, `split` or `crop`, whichever holds first, and how exactly."""
    layout = anatomy.layout
    candidates: list[tuple[str, Factory]] = [("pool", partial(_pool_head, layout))]
    candidates += [("split", partial(_split_head, layout, *found)) for found in _pools_of(model, layout, features, head)]
    if not layout.several:
        candidates.append(("crop", lambda origins: CropHead(layout, _rows(layout, origins))))
    reasons = []
    for kind, factory in candidates:
        verdict = _check(model, anatomy, features, factory)
        if verdict.reason is None:
            return factory, verdict.difference
        reasons.append(f"{kind}: {verdict.reason}")
    raise ValueError(
        f"{anatomy.name} cannot give region logits ({'; '.join(reasons)}). Its logits, region features and stages work; "
        "take a loss without region logits, or another model"
    )


def _check(model: TimmModel, anatomy: Anatomy, features: Features, factory: Factory) -> Verdict:
    rows = _rows(anatomy.layout, CHECKED)
    mechanism = factory(CHECKED).to(next(model.parameters()).device)

    def run(source: Features) -> tuple[Tensor, Tensor]:
        logits, sight = look(model, anatomy.layout, mechanism, source, rows)
        return logits, mechanism(model, sight)

    moved = partial(with_noise, anatomy)
    try:
        verdict = check_regions(run, moved, features, rows[1])
        if verdict.reason is not None:
            return verdict
        # an activation that is a straight line over the values of this map need not be one over those of a trained net
        again = check_regions(run, moved, loud_features(anatomy), rows[1])
        return Verdict(verdict.difference, again.reason)
    except (
        RuntimeError,
        AssertionError,
        AttributeError,
        ValueError,
    ) as error:  # a head that does not take regions of this shape at all
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Verdict(float("inf"), f"its head fails on a region ({what})")


def look(model: TimmModel, layout: Layout, mechanism: nn.Module, features: Features, rows: Tensor) -> tuple[Tensor, Sight]:
    """The model's own logits for these features, and what the mechanism then sees."""
    inner = None
    if isinstance(mechanism, SplitHead):
        logits, inner = mechanism.first(model, features)
    else:
        logits = model.forward_head(features)
    grid = layout.map_of(features)
    return logits, Sight(features, pool(grid, rows), grid, logits, inner)


def _class_token_factory(model: TimmModel, anatomy: Anatomy, mode: str) -> tuple[Factory, float | None]:
    """The definition asked for; `shift` in the place of `attend` where the last block is not one that attend knows."""
    layout, name = anatomy.layout, anatomy.name
    if mode == "attend":
        verdict = check_attend(model, anatomy)
        if verdict.reason is None:
            logger.info(DEFINED, name, mode)
            return (lambda origins: AttendHead(layout, _rows(layout, origins))), verdict.difference
        logger.warning("%s: class-token definition 'shift' instead of 'attend' (%s)", name, verdict.reason)
        mode = "shift"
    logger.info(DEFINED, name, mode)
    # the whole image's shift is zero, so there is nothing to measure
    difference = 0.0 if mode == "shift" else None
    return (lambda origins: ClassTokenHead(layout, _matrices(layout, origins), mode)), difference


def check_attend(model: TimmModel, anatomy: Anatomy) -> Verdict:
    """Whether `attend` holds for this model, and how exactly; the reason where it does not."""
    refusal = partial(Verdict, float("inf"))
    layout, block = anatomy.layout, getattr(model, "blocks", [None])[-1]
    known = ("norm1", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    inside = ("qkv", "q_norm", "k_norm", "norm", "proj", "proj_drop", "num_heads", "scale")
    if layout.primary is None or not all(hasattr(block, a) for a in known) or len(model.blocks) < 2:
        return refusal("its last block is of another kind")
    if not all(hasattr(block.attn, a) for a in inside):
        return refusal("its last attention is of another kind")
    if anatomy.stage_indices:
        return refusal("it has stages of several resolutions")
    try:
        _, inner, _ = last_block_input(model, anatomy.images)
        again = model.norm(block(inner))
        if again.shape != anatomy.features.shape or relative_difference(again, anatomy.features) > 1e-5:
            return refusal("more than a norm follows its last block")
        return _check_attend_regions(model, anatomy, inner)
    except (TypeError, RuntimeError, AttributeError, ValueError) as error:
        return refusal(f"its last block does not run apart ({str(error).splitlines()[0]})")


def last_block_input(model: TimmModel, images: Tensor, blocks: Sequence[int] = ()) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """What the head reads; the input of the last block with its prefix tokens in front, [B, L, C]; and the patch tokens that
    these blocks give, by index: all in one pass."""
    last = len(model.blocks) - 2
    wanted = sorted({last, *blocks})
    features, found = model.forward_intermediates(
        images, indices=wanted, return_prefix_tokens=True, stop_early=False, output_fmt="NLC"
    )
    tokens = {index: patches for index, (patches, _) in zip(wanted, found, strict=True)}
    prefix = found[wanted.index(last)][1]
    return features, torch.cat([prefix, tokens[last]], dim=1), tokens


def _check_attend_regions(model: TimmModel, anatomy: Anatomy, inner: Tensor) -> Verdict:
    layout, block = anatomy.layout, model.blocks[-1]
    rows = _rows(layout, CHECKED)
    mechanism = AttendHead(layout, rows).to(inner.device)
    part = layout.parts[0]

    def run(source: Tensor) -> tuple[Tensor, Tensor]:
        features = model.norm(block(source))
        logits = model.forward_head(features)
        grid = part.to_map(features)
        return logits, mechanism(model, Sight(features, pool(grid, rows), grid, logits, source))

    def moved(source: Tensor, cells: Tensor) -> Tensor:
        mask = part.from_map(cells_on(layout, cells, part.to_map(source)), torch.zeros_like(source))
        return source + noise_like(source, anatomy.generator) * mask

    with perturbed(list(block.modules()), anatomy.generator):  # a LayerScale of 1e-6 would hide everything
        return check_regions(run, moved, inner + noise_like(inner, anatomy.generator), rows[1])


def _rows(layout: Layout, origins: Origins) -> Tensor:
    """The regions on the feature map's grid, [R, H * W]."""
    return rows_on(origins, (layout.height, layout.width))


def _matrices(layout: Layout, origins: Origins) -> list[Tensor | None]:
    """The regions on the grid of every part other than the feature map; None for that one, and for parts without a grid."""
    return [
        rows_on(origins, (part.height, part.width)) if part.height and i != layout.primary else None
        for i, part in enumerate(layout.parts)
    ]


def _pool_head(layout: Layout, origins: Origins) -> nn.Module:
    return PoolHead(layout, _matrices(layout, origins))


def _split_head(layout: Layout, pool_name: str, dims: int, origins: Origins) -> nn.Module:
    return SplitHead(_rows(layout, origins), pool_name, dims)


def _pools_of(model: TimmModel, layout: Layout, features: Features, head: Sequence[nn.Module]) -> list[tuple[str, int]]:
    """The pool modules inside the head that read a whole grid: each one's name, and the dimensions of what it gives."""
    found: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor) or args[0].ndim != 4:
            return
        pools = output.numel() == args[0].shape[0] * args[0].shape[1]
        if args[0].shape[2:] == (layout.height, layout.width) and pools and not any(True for _ in module.parameters()):
            found[module] = output.ndim

    handles = [module.register_forward_hook(note) for module in head if module is not model]
    try:
        model.forward_head(features)
    finally:
        for handle in handles:
            handle.remove()
    return [(n, found[module]) for n, module in model.named_modules() if module in found]
