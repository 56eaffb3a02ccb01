"""A run's folder: claimed by one writer at a time, with a manifest of what made the run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from torch import nn

import distill
from distill.checkpoint import FORMAT
from distill.config import RecipeError, as_dict, carried_over, recipe_fields
from distill.data.decoding import library_versions
from distill.data.remote.urls import is_url
from distill.files import RUN_MANIFEST, RUN_SUMMARY, locked, write_atomically
from distill.models.weights import checksum_bytes
from distill.recipe import Recipe
from distill.report import say
from pipelines.setup.machine import of_main_process
from pipelines.setup.switches import switches

LOCK_SECONDS = 10.0
"""How long a claim waits for the folder: the processes of a launcher that was killed may still be saving."""

MAY_CHANGE = frozenset(field.key for field in recipe_fields() if field.may_change)
"""Recipe keys that a resumed run may say differently."""
DEFAULTS = {field.key: field.default for field in recipe_fields()}
"""What a run of before a key was added did: every new key's default is the way it was."""


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Recipe keys that would make a resumed run another run, each with both values."""
    new = dict(_leaves(now))
    old = {key: DEFAULTS[key] for key in new.keys() & DEFAULTS.keys()} | dict(_leaves(carried_over(before)))
    return [
        f"{key}: {old.get(key)!r} in the run, {new.get(key)!r} asked"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key not in MAY_CHANGE
    ]


class RunFolder:
    """The folder of one run while this program writes to it. Every process holds one with the same manifest."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator, manifest: dict[str, Any]) -> None:
        self.path, self.accelerator = Path(recipe.out), accelerator
        self.recipe = self._adapted(recipe, manifest)
        """The recipe that was asked for, on this number of processes."""
        self.resumed = bool(manifest)
        """Whether the folder held a run when it was claimed."""
        self._manifest = manifest

    @classmethod
    @contextmanager
    def claim(cls, recipe: Recipe, resume: bool, accelerator: Accelerator) -> Iterator[RunFolder]:
        """Makes this the one run that writes to the recipe's folder, for as long as the context is open.

        Raises RecipeError on every process where the folder holds a run and `resume` is not asked, where another process is
        at work in it, or where the run in it was made by another version of this program or from another recipe.
        """
        lock: IO[str] | None = None

        def begin() -> Mapping[str, Any]:
            nonlocal lock
            try:
                lock, manifest = _claim(recipe, resume)
            except OSError as error:
                why = error.strerror or error
                raise RecipeError(f"out: {recipe.out} cannot be a run's folder: {why}; give another --out") from None
            return manifest

        manifest = of_main_process(accelerator, begin)
        with lock or nullcontext():
            yield cls(recipe, accelerator, manifest)

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of the finished run in the folder; None where there is none."""
        path = self.path / RUN_SUMMARY
        return json.loads(path.read_text()) if path.is_file() else None

    def check(self, contents: Mapping[str, Any]) -> None:
        """Raises RecipeError where the run was made from other shards or another teacher than it would go on with."""
        for name, value in contents.items():
            if name in self._manifest and self._manifest[name] != value:
                raise RecipeError(
                    f"--resume: {self.path} was made with other {name} ({self._manifest[name]}) than would be used now"
                    f" ({value}); give what it was made with, or another --out"
                )

    def write(self, facts: Mapping[str, Any]) -> None:
        """Writes the manifest: everything that is needed to know what made this run's numbers, `facts` among it."""
        accelerator, device = self.accelerator, self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        self._manifest = {
            "format": FORMAT,
            "version": distill.__version__,
            "recipe": as_dict(self.recipe),
            "command": sys.argv,
            "git_commit": _git_commit(),
            "versions": _versions(),
            "world_size": accelerator.num_processes,
            "distributed": accelerator.distributed_type.value,
            "device": name,
            "mixed_precision": accelerator.mixed_precision,
            "switches": switches(),
            **facts,
        }
        if accelerator.is_main_process:
            write_atomically(self.path / RUN_MANIFEST, json.dumps(self._manifest, indent=2) + "\n")

    def _adapted(self, recipe: Recipe, manifest: Mapping[str, Any]) -> Recipe:
        """`recipe` for a run that goes on with another number of processes: the global batch and its order stay, the
        micro-batch stays too where `accumulate` can make up for the difference. An `accumulate` that divides is left alone.
        """
        now, total = self.accelerator.num_processes, recipe.train.global_batch_size
        processes = manifest.get("world_size", now)
        if processes == now or recipe.train.accumulate != manifest["recipe"]["train"]["accumulate"]:
            return recipe
        slots = processes * recipe.train.accumulate
        if slots % now == 0:
            accumulate = slots // now
        elif total % now == 0:
            accumulate = 1
        else:
            raise RecipeError(
                f"--resume: {recipe.out} ran on {processes} processes; its global batch {total} does not divide by {now}"
            )
        say(self.accelerator, f"{recipe.out}: {processes} processes before, {now} now; accumulate {accumulate}")
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, accumulate=accumulate))


def _claim(recipe: Recipe, resume: bool) -> tuple[IO[str], dict[str, Any]]:
    """The folder's lock and the manifest of the run in it, empty where there is none."""
    if not recipe.out:
        raise RecipeError("out: '' is no folder; give the run's folder with --out")
    if is_url(recipe.out):
        raise RecipeError(f"out: {recipe.out} is a URL; a run is written to a folder, which can be copied there afterwards")
    folder = Path(recipe.out)
    holds = f"out: {folder} already holds a run; add --resume to go on with it, or give another --out"
    if _read(folder) and not resume:
        raise RecipeError(holds)
    try:
        lock = locked(folder, LOCK_SECONDS)
    except BlockingIOError:
        raise RecipeError(f"out: another process is writing to {folder}; wait for it, or give another --out") from None
    found = _read(folder)  # again: whoever held the folder may have written it
    if found and not resume:
        lock.close()
        raise RecipeError(holds)
    if found and (changed := differences(found["recipe"], as_dict(recipe))):
        lock.close()
        lines = [f"out: {folder} holds a run of another recipe; give another --out, or ask for the same", *changed]
        raise RecipeError("\n  ".join(lines))
    return lock, found


def _read(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, empty where there is none. Raises RecipeError for that of another version."""
    path = folder / RUN_MANIFEST
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found and found.get("format") != FORMAT:
        raise RecipeError(
            f"out: the run in {folder} was made by another version of this program (format {found.get('format', 'unknown')},"
            f" this version has {FORMAT}); finish it with the commit that {path} names, or give another --out"
        )
    return found


def digest(model: nn.Module | None) -> str | None:
    """Hex crc32 of a model's weights and buffers with their names; None for no model."""
    if model is None:
        return None
    value = 0
    for part in checksum_bytes(model):
        value = zlib.crc32(part, value)
    return f"{value:08x}"


def _versions() -> dict[str, str]:
    names = ("torch", "timm", "accelerate", "webdataset", "safetensors", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, **library_versions()}


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
