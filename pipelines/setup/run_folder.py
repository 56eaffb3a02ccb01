"""A run's folder: claimed by one writer, with a manifest of what made it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from distill.config import RecipeError, as_dict
from distill.files import locked, write_atomically
from distill.recipe import Recipe

LOCK_SECONDS = 10.0
"""Waited for: the processes of a killed launcher may still be saving."""

MAY_CHANGE = (
    "out",
    "data.train",
    "data.val",
    "data.loader",
    "data.num_threads",
    "data.max_bad_rate",
    "teacher.weights",
    "teacher.evaluate",
    "teacher.expected_top1",
    "teacher.published",
    "teacher.tolerance",
    "teacher.least_agreement",
    "train.accumulate",
    "train.overlap_teacher",
    "train.max_steps",
    "train.evaluate_batch_size",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.skip_nonfinite",
    "train.timeout_minutes",
    "train.keep_checkpoints",
    "report",
)
"""Recipe keys that a resumed run may say differently: they do not change what is computed. Paths are among them because data
and weights may move; their contents may not change, see `check_contents`."""


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each recipe key that would make a resumed run another run, with both values."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{key}: {old.get(key)!r} in the run, {new.get(key)!r} asked"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)
    ]


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raises RecipeError where `folder` holds a run of another recipe, with every difference."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    changed = differences(json.loads(manifest.read_text())["recipe"], as_dict(recipe))
    if changed:
        lines = [f"out: {folder} holds a run of another recipe; give another --out, or ask for the same", *changed]
        raise RecipeError("\n  ".join(lines))


def _claim(folder: Path, recipe: Recipe, resume: bool) -> IO[str]:
    manifest = folder / "manifest.json"
    if manifest.is_file() and not resume:
        raise RecipeError(f"out: {folder} already holds a run; add --resume to go on with it, or give another --out")
    try:
        lock = locked(folder, LOCK_SECONDS)
    except BlockingIOError:
        raise RecipeError(f"out: another process is writing to {folder}; wait for it, or give another --out") from None
    check_recipe(folder, recipe)
    return lock


def claim(folder: Path, recipe: Recipe, resume: bool, accelerator: Accelerator) -> IO[str] | None:
    """Makes this the one run that writes to `folder`, for as long as the returned lock lives.

    Raises RecipeError on every process if the folder holds a run and `resume` is not asked, if another process is at work
    in it, or if the run in it was made from another recipe.
    """
    lock, problem = None, [""]
    if accelerator.is_main_process:
        try:
            lock = _claim(folder, recipe, resume)
        except RecipeError as error:
            problem = [str(error)]
        except OSError as error:
            problem = [f"out: {folder} cannot be a run's folder: {error.strerror or error}; give another --out"]
    broadcast_object_list(problem)
    if problem[0]:
        raise RecipeError(problem[0])
    return lock


def check_contents(folder: Path, contents: Mapping[str, Any]) -> None:
    """Raises RecipeError where the run in `folder` was made from other shards or another teacher than it would go on with."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    before = json.loads(manifest.read_text())
    for name, value in contents.items():
        if name in before and before[name] != value:
            raise RecipeError(
                f"--resume: {folder} was made with other {name} ({before[name]}) than would be used now ({value});"
                " give what it was made with, or another --out"
            )


def recorded(folder: Path, name: str) -> Any:
    """What the manifest of the run in `folder` says of `name`; None where there is neither."""
    manifest = folder / "manifest.json"
    return json.loads(manifest.read_text()).get(name) if manifest.is_file() else None


def digest(model: nn.Module | None) -> str | None:
    """A checksum of a model's weights and buffers."""
    if model is None:
        return None
    value = 0
    for name, tensor in model.state_dict().items():
        value = zlib.crc32(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), value)
        )
    return f"{value:08x}"


def adapted(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """`recipe` for the run in its folder on another number of processes: the global batch and its order stay, the
    micro-batch stays too where `accumulate` can make up for the difference. An `accumulate` that divides is left alone.
    """
    manifest = Path(recipe.out) / "manifest.json"
    if not manifest.is_file():
        return recipe
    before = json.loads(manifest.read_text())
    slots = before["world_size"] * before["recipe"]["train"]["accumulate"]
    now, total = accelerator.num_processes, recipe.train.global_batch_size
    if before["world_size"] == now or recipe.train.accumulate != before["recipe"]["train"]["accumulate"]:
        return recipe
    if slots % now == 0:
        accumulate = slots // now
    elif total % now == 0:
        accumulate = 1
    else:
        raise RecipeError(
            f"--resume: {recipe.out} ran on {before['world_size']} processes; its global batch {total} does not divide by {now}"
        )
    accelerator.print(f"{recipe.out}: {before['world_size']} processes before, {now} now; accumulate {accumulate}")
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, accumulate=accumulate))


def _versions() -> dict[str, str]:
    names = ("torch", "timm", "accelerate", "webdataset", "nvidia-dali-cuda120", "safetensors", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_commit() -> str:
    """The commit of the code, with `-dirty` where files were changed since; `unknown` outside a checkout."""
    root = Path(__file__).parent.parent.parent
    try:
        name = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip()


def write_manifest(folder: Path, recipe: Recipe, accelerator: Accelerator, extra: Mapping[str, Any]) -> None:
    """`manifest.json`: everything needed to know what made this run's numbers."""
    if not accelerator.is_main_process:
        return
    device = accelerator.device
    content = {
        "recipe": as_dict(recipe),
        "command": sys.argv,
        "git_commit": _git_commit(),
        "versions": _versions(),
        "world_size": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "mixed_precision": accelerator.mixed_precision,
        **extra,
    }
    write_atomically(folder / "manifest.json", json.dumps(content, indent=2) + "\n")
