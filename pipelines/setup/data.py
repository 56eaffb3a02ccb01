"""Recipe -> the shards' indexes, loaders and what happens to a batch on the device."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from distill.batch_transform import BatchTransform, check_pairs
from distill.config import RecipeError
from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import EntryPlan, Views
from distill.data.dali import DaliLoader
from distill.data.dali_graph import DecodeMode, dali_available
from distill.data.decoding import DecodeName, Decoding, choose_decoding
from distill.data.faults import Quarantine
from distill.data.index import ShardIndex
from distill.data.loaders import Task, eval_task, train_task
from distill.data.order import Lanes, TrainOrder, check_lanes, classes_per_shard
from distill.data.reference import ReferenceLoader
from distill.data.remote.cache import cache_folder
from distill.data.remote.urls import is_url
from distill.models.backbone import Backbone
from distill.protocols import DataFacts, InputSpec, Loader
from distill.recipe import Data, Recipe
from distill.teacher_cache.files import TeacherCache
from pipelines.setup.machine import micro_batch_of, num_nodes, num_threads
from pipelines.setup.models import Models
from pipelines.setup.remote import schedule_run

logger = logging.getLogger("distill.data")

LOADERS: dict[str, Callable[[Task], Loader]] = {"dali": DaliLoader, "reference": ReferenceLoader}
"""Recipe name -> loader; the names are those of `LoaderName`."""


class Splits(NamedTuple):
    """The shard indexes of one data set."""

    train: ShardIndex
    val: ShardIndex

    def waiting(self) -> str:
        """The remote shards that this process waits for, in words; empty where it waits for none."""
        return "; ".join(filter(None, (index.store.waiting() for index in self)))

    def close(self) -> None:
        """Ends the downloads of remote shards."""
        for index in self:
            index.store.close()


def build_splits(recipe: Recipe, accelerator: Accelerator) -> Splits:
    """Both indexes, checked against their shards and each other; prepares the embedded data set where the recipe asks."""
    root = Path(recipe.data.train).parent
    # only into the place that the recipe means: a mistyped --train must not fill somebody's folder
    here = not is_url(recipe.data.train)
    if (
        here
        and recipe.data.prepare == "digits"
        and [root / "train", root / "val"] == [Path(recipe.data.train), Path(recipe.data.val)]
    ):
        from shards.prepare import prepare_digits

        with accelerator.main_process_first():
            prepare_digits(root)
    cache = cache_folder(recipe.data.cache_dir)
    train, val = ShardIndex.open(recipe.data.train, cache), ShardIndex.open(recipe.data.val, cache)
    if train.class_names != val.class_names:
        raise RecipeError(
            f"data: {recipe.data.train} has {train.num_classes} classes and {recipe.data.val} has {val.num_classes},"
            " or their names differ; prepare both splits in one run"
        )
    order = train_order(recipe, train)  # a batch that the images do not fill is refused before models are built
    if order.lanes:
        check_node_lanes(recipe, order.lanes, train, num_nodes(accelerator.num_processes))
    schedule_run(recipe, order, train, val, accelerator)  # a cache without the room for it is refused too
    return Splits(train, val)


def train_order(recipe: Recipe, train: ShardIndex) -> TrainOrder:
    """The global batches of a run. Raises ValueError where there is not one."""
    batch, blocks, repeats = recipe.train.global_batch_size, recipe.data.shuffle_block, recipe.augment.repeats
    return TrainOrder(train.num_samples, batch, recipe.seed, blocks, repeats, lanes_of(recipe, train))


def lanes_of(recipe: Recipe, train: ShardIndex) -> Lanes | None:
    """The lanes of a run's order; None for another order."""
    data = recipe.data
    return Lanes(data.lanes, data.lane_window, train.shard_samples) if data.shuffle == "lanes" else None


LEAST_MIXED = 0.5
"""Share that the classes of a shard must be of those of a mixed one, in the mean: it is 1.00 where shards are mixed, and 0.003
where 1,024 shards of ImageNet are sorted by class."""


def check_node_lanes(recipe: Recipe, lanes: Lanes, train: ShardIndex, nodes: int) -> None:
    """Raises RecipeError where a node would read shards of other nodes' lanes, and where shards are sorted by class, of which
    lanes would make batches of few classes."""
    try:
        check_lanes(lanes.count, recipe.train.global_batch_size, nodes, recipe.train.accumulate)
    except ValueError as error:
        raise RecipeError(f"data.lanes: {error}") from None
    found, chance = classes_per_shard(train.labels, lanes.shard_samples, train.num_classes)
    if found < LEAST_MIXED * chance:
        raise RecipeError(
            f"data.shuffle: lanes mix a few shards only, and those of {train.place} are sorted by class: {found:.1f} classes"
            f" in a shard, {chance:.1f} if they were mixed; say --data.shuffle global, or write mixed shards with"
            " `python shards/prepare.py folder`"
        )


def data_facts(recipe: Recipe, train: ShardIndex, world_size: int) -> DataFacts:
    """The facts of the training split that criteria may be made from."""
    return DataFacts(train.num_samples, torch.from_numpy(train.labels), micro_batch_of(recipe, world_size), train.class_names)


def check_mixing(recipe: Recipe, micro_batch: int) -> None:
    """Raises RecipeError where Mixup or CutMix cannot go with the batch."""
    if recipe.augment.mixup or recipe.augment.cutmix:
        try:
            check_pairs(micro_batch)
        except ValueError as error:
            raise RecipeError(f"augment.mixup: {error}") from None


def eval_spec(recipe: Recipe, model: Backbone) -> InputSpec:
    """The input of the student's evaluation: its own, unless the recipe says otherwise."""
    spec = model.input_spec
    if side := recipe.data.eval_image_size:
        spec = dataclasses.replace(spec, height=side, width=side)
    if recipe.data.crop_fraction:
        spec = dataclasses.replace(spec, crop_fraction=recipe.data.crop_fraction)
    if recipe.data.interpolation != "auto":
        spec = dataclasses.replace(spec, interpolation=recipe.data.interpolation)
    return spec


def loader_name(asked: str) -> str:
    """The loader's name in `LOADERS`; `auto` is DALI where it is installed. Raises RecipeError for DALI where it is not."""
    if asked == "dali" and not dali_available():
        raise RecipeError(
            "data.loader: 'dali', but nvidia.dali cannot be imported; install the extra dali-cuda120 (CUDA 12) or"
            " dali-cuda130 (CUDA 13), as `pip install -e '.[dali-cuda120]'`, or give 'reference'"
        )
    if asked == "auto":
        return "dali" if dali_available() else "reference"
    return asked


_warn_once = cache(logger.warning)

_decodings: dict[DecodeName, Decoding] = {}
"""What this process knows about decoding: a proof takes seconds, and all its loaders decode in one way."""


def find_decoding(asked: DecodeName, index: ShardIndex, accelerator: Accelerator, threads: int) -> Decoding:
    """How this node's GPUs decode. Its first process finds out, with images of the split, and tells the others; all processes
    of the run must call this. A warning is said once a node."""
    if asked not in _decodings:
        first = accelerator.is_local_main_process
        found = choose_decoding(asked, index, accelerator.device, num_threads(threads)) if first else None
        told: list[Decoding] = gather_object([found])
        _decodings[asked] = told[accelerator.process_index - accelerator.local_process_index]
        if first and _decodings[asked].warning:
            logger.warning(_decodings[asked].warning)
    return _decodings[asked]


def decode_mode(loader: str, asked: DecodeName, index: ShardIndex, accelerator: Accelerator, threads: int) -> DecodeMode | None:
    """The mode of a loader by its recipe name; None for the reference, which decodes by PIL."""
    if loader_name(loader) == "dali":
        return find_decoding(asked, index, accelerator, threads).mode
    if loader == "auto" and accelerator.device.type == "cuda" and accelerator.is_local_main_process:
        _warn_once(
            "data.loader: the CPU decodes, by PIL, what was meant for the GPU: nvidia.dali cannot be imported; install one of"
            " nvidia-dali-cuda120 and nvidia-dali-cuda130, that of this machine's CUDA"
        )
    return None


def decoding_facts(recipe: Recipe, index: ShardIndex, accelerator: Accelerator) -> dict[str, Any]:
    """The loader, how it decodes and what was tried before that was known, as plain JSON for a run's manifest."""
    loader, data = loader_name(recipe.data.loader), recipe.data
    if loader != "dali":
        return {"loader": loader}
    return {"loader": loader, **find_decoding(data.decode, index, accelerator, data.num_threads).facts()}


def fault_report(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """The file in which this process reports bad samples, a JSON line each; None outside of a run's folder."""
    out = Path(recipe.out)
    return out / f"faults-rank{accelerator.process_index}.jsonl" if out.is_dir() else None


class TrainImages(NamedTuple):
    """What training makes of an image: its size (height, width) and the settings of its views."""

    size: tuple[int, int]
    transform: TrainTransform


def train_images(recipe: Recipe, models: Models) -> TrainImages:
    """Views at the larger of both models' input sizes; the other model resizes on the device."""
    specs = [models.student.input_spec, *([] if models.teacher is None else [models.teacher.backbone.input_spec])]
    asked = recipe.data.interpolation
    transform = recipe.augment.of_each_image(specs[0].interpolation if asked == "auto" else asked)
    return TrainImages((max(s.height for s in specs), max(s.width for s in specs)), transform)


def build_entry_loader(
    recipe: Recipe, splits: Splits, images: TrainImages, entries: Sequence[Any], batch_size: int, accelerator: Accelerator
) -> Loader:
    """The views that are named, (view, samples) for each batch, as training shows them."""
    plan = EntryPlan(
        entries, batch_size=batch_size, size=images.size, transform=images.transform, seed=recipe.augment.view_seed
    )
    quarantine = Quarantine(splits.train, recipe.data.max_bad_rate, accelerator.process_index)
    mode = decode_mode(recipe.data.loader, recipe.data.decode, splits.train, accelerator, recipe.data.num_threads)
    task = Task(splits.train, plan, quarantine, accelerator.device, num_threads(recipe.data.num_threads), mode)
    return LOADERS[loader_name(recipe.data.loader)](task)


def build_train_loader(
    recipe: Recipe, splits: Splits, models: Models, accelerator: Accelerator, cache: TeacherCache | None = None
) -> Loader:
    """The training batches, with the rows of a teacher cache where there is one; samples that it lacks are replaced."""
    images, count = train_images(recipe, models), recipe.augment.views or (0 if cache is None else cache.views)
    task = train_task(
        splits.train,
        size=images.size,
        transform=images.transform,
        global_batch_size=recipe.train.global_batch_size,
        accumulate=recipe.train.accumulate,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=recipe.seed,
        shuffle_block=recipe.data.shuffle_block,
        repeats=recipe.augment.repeats,
        plain_repeats=recipe.augment.plain_repeats,
        lanes=lanes_of(recipe, splits.train),
        device=accelerator.device,
        num_threads=num_threads(recipe.data.num_threads),
        max_bad_rate=recipe.data.max_bad_rate,
        fault_report=fault_report(recipe, accelerator),
        decode=decode_mode(recipe.data.loader, recipe.data.decode, splits.train, accelerator, recipe.data.num_threads),
        views=Views(count, recipe.augment.view_seed) if count else None,
        teacher=cache,
    )
    if cache is not None:
        task.quarantine.update(cache.absent)
    return LOADERS[loader_name(recipe.data.loader)](task)


def create_eval_loader(
    index: ShardIndex,
    spec: InputSpec,
    batch_size: int,
    accelerator: Accelerator,
    *,
    loader: str = Data.loader,
    decode: DecodeName = Data.decode,
    threads: int = Data.num_threads,
    max_bad_rate: float = Data.max_bad_rate,
    report: Path | None = None,
) -> Loader:
    """Every image of a split once, as `spec` says. The options are those of the recipe's section `data`; bad samples are
    reported to `report`, a JSON line each."""
    task = eval_task(
        index,
        spec=spec,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        num_threads=num_threads(threads),
        max_bad_rate=max_bad_rate,
        fault_report=report,
        decode=decode_mode(loader, decode, index, accelerator, threads),
    )
    return LOADERS[loader_name(loader)](task)


def build_eval_loader(recipe: Recipe, index: ShardIndex, spec: InputSpec, accelerator: Accelerator) -> Loader:
    """The loader of a run's evaluations."""
    return create_eval_loader(
        index,
        spec,
        recipe.train.evaluate_batch_size or micro_batch_of(recipe, accelerator.num_processes),
        accelerator,
        loader=recipe.data.loader,
        decode=recipe.data.decode,
        threads=recipe.data.num_threads,
        max_bad_rate=recipe.data.max_bad_rate,
        report=fault_report(recipe, accelerator),
    )


def build_transform(recipe: Recipe, num_classes: int, spec: InputSpec, device: torch.device) -> BatchTransform:
    """The part of the recipe's augmentation that the device does to a batch before the models see it."""
    augment = recipe.augment
    return BatchTransform(
        num_classes=num_classes,
        mean=spec.mean,
        std=spec.std,
        device=device,
        channels_last=recipe.train.channels_last,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mix_probability=augment.mix_probability,
        cutmix_share=augment.cutmix_share,
        erasing=augment.erasing,
        erasing_mode=augment.erasing_mode,
        mix_off_epoch=augment.mix_off_epoch,
    )
