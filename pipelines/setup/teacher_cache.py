"""Recipe -> what a teacher cache for it must hold, and a cache of its that has been compared, checked and opened."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

import distill
from distill.batch_transform import to_pixels
from distill.config import RecipeError
from distill.models.backbone import Backbone
from distill.models.teacher import FrozenTeacher
from distill.models.weights import checksum_bytes
from distill.protocols import Criterion, Loader, ModelFacts, Needs
from distill.recipe import Recipe
from distill.seeds import derive_seed
from distill.teacher_cache.files import ABSENT, FORMAT, CacheError, TeacherCache, differences
from distill.teacher_cache.teacher import CachedTeacher, asked_regions
from pipelines.setup.data import Splits, build_entry_loader, loader_name, train_images
from pipelines.setup.models import Models

Entry = tuple[int, NDArray[np.int64]]
"""A view and samples of it."""
CHECKED = 64
"""Entries that are computed again before a cache is used."""
LIMIT = 0.1
"""Largest mean difference of logits, in units of their standard deviation. Another decoder gives 0.002, a teacher in bfloat16
0.026, all pixels off by a level 0.06; a window that is off by a pixel 0.13, a flip that was forgotten 0.23."""


def check_cacheable(recipe: Recipe, models: Models, codec: str, num_samples: int) -> None:
    """RecipeError, with a line and the reason for each, where a recipe asks for what no cache of this codec can give."""
    if problems := uncacheable(recipe, models, codec, num_samples):
        raise RecipeError("teacher.cache cannot serve this recipe\n  " + "\n  ".join(problems))


def uncacheable(recipe: Recipe, models: Models, codec: str, num_samples: int) -> list[str]:
    """What a recipe asks for that no cache of this codec can give, each with the reason."""
    return [*_mixtures(recipe), *_unservable(models, codec, num_samples)]


def _mixtures(recipe: Recipe) -> Iterator[str]:
    for name in ("mixup", "cutmix"):
        if value := getattr(recipe.augment, name):
            yield (
                f"augment.{name} {value}: the teacher must see the mixture, which is drawn anew in every step; set it to 0, or"
                " train without a cache"
            )
    if recipe.augment.erasing:
        yield (
            f"augment.erasing {recipe.augment.erasing}: the teacher must see what is left, and the box is drawn anew in every"
            " step; set it to 0, or train without a cache"
        )


def _unservable(models: Models, codec: str, num_samples: int) -> Iterator[str]:
    if models.teacher is None:
        yield "teacher.name none: there is no teacher whose outputs could be kept; name one, or drop teacher.cache"
        return
    facts = models.teacher.backbone.anatomy.facts
    for name, criterion in models.criteria.items():
        needs = criterion.teacher_needs or Needs()
        if size := map_bytes(needs, facts):
            yield (
                f"loss.{name}: reads whole maps of the teacher, {size * num_samples / 1e9:,.3g} GB for each view in float16;"
                " train without a cache, or drop it"
            )
        elif codec == "topk":
            yield from _beyond_topk(name, criterion, needs)


def _beyond_topk(name: str, criterion: Criterion, needs: Needs) -> Iterator[str]:
    if needs.embedding or needs.head_bias or needs.region_features:
        yield f"loss.{name}: reads features, and codec topk keeps logits alone; make the cache with --codec features"
    elif (needs.logits or needs.region_logits) and criterion.teacher_temperature != 1:
        found = criterion.teacher_temperature
        how = "not through a softmax alone" if found is None else f"at temperature {found:g}"
        yield (
            f"loss.{name}: reads the teacher's logits {how}; gradients by codec topk are then far off;"
            f" make the cache with --codec features{'' if found is None else f', or say --loss.{name}.temperature 1'}"
        )


def map_bytes(needs: Needs, facts: ModelFacts) -> int:
    """Bytes of one image's maps that these needs ask for, in float16."""
    maps = {("stage", stage): facts.stages[stage] for stage in needs.stages}
    maps |= {("before", stage): facts.stages[stage] for stage in needs.preactivations}
    maps |= {("block", block): facts.blocks[block] for block in needs.blocks}
    return 2 * sum(math.prod(shape) for shape in maps.values())


def weights_sha256(model: nn.Module) -> str:
    """Hex sha256 of a model's weights and buffers with their names."""
    digest = hashlib.sha256()
    for part in checksum_bytes(model):
        digest.update(part)
    return digest.hexdigest()


def cache_facts(recipe: Recipe, models: Models, splits: Splits, accelerator: Accelerator) -> dict[str, Any]:
    """All that the rows of a cache depend on but its codec and its regions, as its manifest says it."""
    assert models.teacher is not None
    backbone, images = models.teacher.backbone, train_images(recipe, models)
    loader = loader_name(recipe.data.loader)
    class_map = backbone.class_map
    return {
        "format": FORMAT,
        "num_samples": splits.train.num_samples,
        "index_sha256": splits.train.digest,
        "view_seed": recipe.augment.view_seed,
        "image_size": list(images.size),
        "transform": dataclasses.asdict(images.transform),
        "pixels": loader if loader == "reference" else f"{loader}-{'gpu' if accelerator.device.type == 'cuda' else 'cpu'}",
        "teacher": {
            "name": recipe.teacher.name,
            "weights_sha256": weights_sha256(backbone.model),
            "class_map": None if class_map is None else hashlib.sha256(str(tuple(class_map)).encode()).hexdigest(),
            "precision": recipe.teacher.precision if recipe.teacher.precision != "auto" else accelerator.mixed_precision,
            "input": dataclasses.asdict(backbone.input_spec),
            "mechanism": backbone.mechanism,
            "grid": list(backbone.grid),
        },
        "made_with": {"distill": distill.__version__, "timm": timm.__version__, "torch": torch.__version__},
    }


def regions_fact(backbone: Backbone) -> list[dict[str, Any]]:
    """The regions that a backbone is asked for, as a manifest lists them."""
    return [dataclasses.asdict(each) for each in asked_regions(backbone.needs)]


class Served(NamedTuple):
    """The teacher that a run calls, and the cache that it reads; None for a live one."""

    teacher: nn.Module | None
    cache: TeacherCache | None


def open_cache(recipe: Recipe, models: Models, splits: Splits, accelerator: Accelerator) -> Served:
    """The recipe's cache and the teacher that reads it; the live one where the recipe names no cache.

    RecipeError with every difference at once where it is another recipe's, or cannot serve this one. CacheError where its rows
    are not what loader and teacher give now.
    """
    if not recipe.teacher.cache:
        return Served(models.teacher, None)
    try:
        cache = TeacherCache.open(recipe.teacher.cache, recipe.augment.views)
    except ValueError as error:
        raise RecipeError(f"teacher.cache: {error}") from None
    if models.teacher is None:
        check_cacheable(recipe, models, cache.facts["codec"]["name"], splits.train.num_samples)
    assert models.teacher is not None
    changed = uncacheable(recipe, models, cache.facts["codec"]["name"], splits.train.num_samples)
    changed += _others(cache, recipe, cache_facts(recipe, models, splits, accelerator))
    teacher: CachedTeacher | None = None
    try:
        teacher = CachedTeacher(models.teacher, cache)
    except ValueError as error:
        asked = regions_fact(models.teacher.backbone)
        changed.append(f"regions: {cache.facts['regions']} in the cache, {asked} asked ({error})")
    if changed or teacher is None:
        lines = "\n  ".join(changed)
        raise RecipeError(f"teacher.cache: {cache.folder} is of another recipe; ask for the same, or make another\n  {lines}")
    entries = chosen_entries(cache, recipe.augment.views or cache.views)
    loader = build_entry_loader(recipe, splits, train_images(recipe, models), entries, len(entries[0][1]), accelerator)
    check_entries(cache, teacher, entries, loader, accelerator)
    return Served(teacher, cache)


def _others(cache: TeacherCache, recipe: Recipe, facts: dict[str, Any]) -> Iterator[str]:
    """What of a recipe is not what the cache was made for, a line each."""
    yield from differences(cache.facts, facts)
    if recipe.augment.views > cache.views:
        yield f"augment.views: {cache.views} in the cache, {recipe.augment.views} asked"
    allowed = math.ceil(recipe.data.max_bad_rate * cache.facts["num_samples"])
    if len(cache.absent) > allowed:
        yield (
            f"{len(cache.absent)} samples could not be read when the cache was made ({cache.folder / ABSENT}), and"
            f" data.max_bad_rate {recipe.data.max_bad_rate:g} allows {allowed}: make it again from whole shards, or allow more"
        )


def check_entries(
    cache: TeacherCache, teacher: CachedTeacher, entries: Sequence[Entry], loader: Loader, accelerator: Accelerator
) -> None:
    """Computes entries of the cache again, whose images the loader gives, and closes that. CacheError where a view's differ."""
    worst, where = 0.0, 0
    try:
        for (view, _), batch in zip(entries, loader.epoch(0), strict=True):
            if not len(batch.labels):
                continue  # gone bad since: training replaces it
            rows = torch.from_numpy(cache.read(view, batch.sample_ids.cpu().numpy())).to(accelerator.device)
            with accelerator.autocast():
                live, found = teacher.both_logits(to_pixels(batch.images), batch._replace(teacher=rows))
            apart = float((live - found).abs().mean() / live.std())
            worst, where = max((worst, where), (apart, view))
    finally:
        loader.close()
    if not worst <= LIMIT:
        raise CacheError(
            f"{cache.folder}: view {where} is not what loader and teacher give now: logits differ by {worst:.3f} in the mean"
            f" of their standard deviation, and {LIMIT} is the limit; another decoder, other weights or a damaged file;"
            " `--verify` looks at the files; else make the cache again"
        )


def chosen_entries(cache: TeacherCache, views: int) -> list[Entry]:
    """The entries of the check, `CHECKED` or a few more, as many of each view; of many views half as many are looked at, two
    samples each. Never an entry that has no row."""
    present = np.setdiff1d(np.arange(cache.facts["num_samples"]), cache.absent)
    some = np.unique(np.linspace(0, views - 1, min(views, CHECKED // 2)).astype(int))
    each = min(len(present), -(-CHECKED // len(some)))
    seeds = [derive_seed(cache.facts["view_seed"], "spot check", int(view)) for view in some]
    drawn = [np.argsort(np.random.Philox(key=seed).random_raw(len(present)))[:each] for seed in seeds]
    return [(int(view), np.sort(present[places])) for view, places in zip(some, drawn, strict=True)]


def live_teacher(models: Models) -> FrozenTeacher:
    """The teacher; for commands that need one. RecipeError where there is none."""
    if models.teacher is None:
        raise RecipeError("teacher.name: none; a cache is of a teacher's outputs, name one")
    return models.teacher
