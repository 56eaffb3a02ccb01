"""Shards of a remote store in a run: when its node needs them, the room for them in its cache, and the line that says so."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from accelerate import Accelerator

from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.data.order import TrainOrder
from distill.data.remote.cache import KEPT_FREE, Room, share_room
from distill.data.remote.cached_store import CachedStore
from distill.data.remote.fetch import CONNECTIONS
from distill.data.remote.schedule import ShardSchedule, eval_schedule, train_schedule
from distill.recipe import Recipe
from pipelines.setup.machine import local_processes, micro_batch_of, num_nodes

Schedules = dict[str, tuple[CachedStore, ShardSchedule, int]]
"""Split -> the store of its shards, the schedule of this node, and the bytes that its cache may hold."""


def remote_store(index: ShardIndex) -> CachedStore | None:
    """The store of a split whose shards are no local files; None for one whose are."""
    return index.store if isinstance(index.store, CachedStore) else None


def schedule_run(recipe: Recipe, order: TrainOrder, train: ShardIndex, val: ShardIndex, accelerator: Accelerator) -> Schedules:
    """The schedules of a run's remote splits. Raises RecipeError where the cache has too little room for this order."""
    schedules = {}
    nodes, accumulate = num_nodes(accelerator.num_processes), recipe.train.accumulate
    if remote_store(train) is not None:
        node = accelerator.process_index // local_processes()
        sizes = [shard.bytes for shard in train.shards]
        schedules["train"] = train_schedule(order, train.shard_samples, sizes, node=node, nodes=nodes, accumulate=accumulate)
    if remote_store(val) is not None:
        batch = recipe.train.evaluate_batch_size or micro_batch_of(recipe, accelerator.num_processes)
        schedules["val"] = _evaluation_schedule(val, batch, accelerator)
    remedy = "more nodes, fewer --data.lanes or a smaller --data.lane_window" if order.lanes else "--data.shuffle lanes"
    return share_cache({"train": train, "val": val}, schedules, recipe.data.cache_limit, "--data.cache_limit", remedy)


def schedule_evaluation(index: ShardIndex, batch_size: int, limit: float, accelerator: Accelerator) -> Schedules:
    """The schedule of an evaluation of a remote split, none of a local one. Raises RecipeError as `schedule_run` does."""
    schedules = {} if remote_store(index) is None else {"val": _evaluation_schedule(index, batch_size, accelerator)}
    return share_cache({"val": index}, schedules, limit, "--cache-limit", "a smaller batch size")


def _evaluation_schedule(index: ShardIndex, batch_size: int, accelerator: Accelerator) -> ShardSchedule:
    """The schedule of this node in evaluation."""
    first = accelerator.process_index - accelerator.process_index % local_processes()
    node = range(first, min(first + local_processes(), accelerator.num_processes))
    sizes = [shard.bytes for shard in index.shards]
    return eval_schedule(index.shard_samples, sizes, batch_size=batch_size, node=node, world_size=accelerator.num_processes)


def share_cache(
    splits: Mapping[str, ShardIndex], schedules: Mapping[str, ShardSchedule], limit: float, option: str, remedy: str
) -> Schedules:
    """The schedules of splits, in the room of a limit in GB; 0 is the disk, but for a little. RecipeError for too little.

    option: sets the limit. remedy: what else makes the need smaller.
    """
    stores = {name: store for name in schedules if (store := remote_store(splits[name])) is not None}
    if not stores:
        return {}
    held = sum(store.held_bytes() for store in stores.values())
    disk = shutil.disk_usage(next(iter(stores.values())).folder.parent)
    room = int(limit * 1e9) if limit else held + max(0, int(disk.free - KEPT_FREE * disk.total))
    wanted = {name: Room(schedule.least_bytes(), schedule.epoch_bytes()) for name, schedule in schedules.items()}
    try:
        more = f"a larger {option}" if limit else "a disk that has more free"
        shares = share_room(room, wanted, f"give {more}, or {remedy}")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if limit and room > held + disk.free:
        needed = min(room, sum(each.everything for each in wanted.values()))
        if needed > held + disk.free:
            raise RecipeError(
                f"{option} {limit:g} GB, of which {needed / 1e9:.3g} GB would be used, but the disk has"
                f" {(held + disk.free) / 1e9:.3g} GB for it; give a smaller limit, or another folder of the cache"
            )
    return {name: (stores[name], schedules[name], shares[name]) for name in stores}


def follow(schedules: Schedules) -> str:
    """Fetches ahead and evicts by these schedules from now on; the line that says what that will take, empty without any."""
    parts = []
    for name, (store, schedule, room) in schedules.items():
        store.follow(schedule, room)
        needs, least = schedule.epoch_bytes(), schedule.least_bytes()
        often = "once a run" if room >= needs else "every epoch"
        parts.append(f"{name} {needs / 1e9:.3g} GB {often}, in {room / 1e9:.3g} GB (at least {least / 1e9:.3g})")
    if not parts:
        return ""
    folder = next(iter(schedules.values()))[0].folder.parent
    return (
        f"remote shards: each node reads {'; '.join(parts)} of {folder}; {CONNECTIONS} connections for each of"
        f" {local_processes()} processes"
    )
