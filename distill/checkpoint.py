"""Checkpoints that are whole or absent: written aside, synced, renamed, pointer last; never the teacher.

    checkpoints/
      step-00000120/        student.safetensors criteria.safetensors [ema.safetensors] state.pt checkpoint.json
      LAST  BEST            the names of two of those folders

`checkpoint.json` is written last inside the folder and holds each file's size and CRC-32: a folder without it, or one that
does not match it, is passed over with a warning for the one before.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.files import sync, write_atomically

log = logging.getLogger(__name__)

FORMAT = 1


class Snapshot(NamedTuple):
    """What one checkpoint holds."""

    weights: dict[str, dict[str, Tensor]]
    """`student`, `criteria`, perhaps `ema`: each a flat state dict, one safetensors file."""
    state: dict[str, Any]
    """Optimiser and scaler state: tensors and plain containers only (read back with `weights_only=True`)."""
    meta: dict[str, Any]
    """JSON: step, best top-1, counters, everything that is not a tensor."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none can be read."""


def _host_copy(value: Any) -> Any:
    """`value` with every tensor copied to host memory, so that training may go on while it is written.

    Strides stay: an optimiser that sums over a channels_last state (LAMB's norms) would sum in another order otherwise, and
    a resumed run would not be the same run.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {k: _host_copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_host_copy(v) for v in value)
    return value


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors can write; modules copy weights into their own strides when they load them."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _write(folder: Path, snapshot: Snapshot) -> None:
    """The files of `snapshot` in a new `folder`, synced, `checkpoint.json` last."""
    folder.mkdir(parents=True)
    for name, tensors in snapshot.weights.items():
        save_file(_contiguous(tensors), folder / f"{name}.safetensors")
    torch.save(snapshot.state, folder / "state.pt")
    files = {}
    for path in sorted(folder.iterdir()):
        sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    write_atomically(folder / "checkpoint.json", json.dumps({"format": FORMAT, "files": files, "meta": snapshot.meta}))


def read(folder: Path) -> Snapshot:
    """The snapshot in `folder`, after every file was checked against its size and checksum.

    Raises CheckpointError that names what is missing or damaged.
    """
    try:
        header = json.loads((folder / "checkpoint.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a whole checkpoint: {error}") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: format {header.get('format')}, this version reads {FORMAT}")
    for name, expected in header["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path}: missing or cut short, {expected['bytes']} bytes were written")
        if _checksum(path) != expected["crc32"]:
            raise CheckpointError(f"{path}: damaged, its checksum is not the one that was written")
    weights = {p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}
    return Snapshot(weights, torch.load(folder / "state.pt", map_location="cpu", weights_only=True), header["meta"])


def _name(step: int) -> str:
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of one run: `save` copies to the host and writes in a thread, `newest` finds what can be resumed.

    Only the main process writes; every process may read.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._copying = self._waiting = self._writing = 0.0
        self._saved_at = time.monotonic()
        self._damaged: set[str] = set()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Starts writing `step-STEP`; waits first for what is still being written.

        Raises CheckpointError if that earlier write failed (a full disk); what was there before is intact.
        """
        self.wait()
        self._saved_at = time.monotonic()
        begin = time.perf_counter()
        copied = Snapshot(_host_copy(snapshot.weights), _host_copy(snapshot.state), snapshot.meta)
        self._copying += time.perf_counter() - begin
        self._pending = self._writer.submit(self._commit, step, copied)

    @property
    def seconds_since_save(self) -> float:
        """Seconds since the last save began, or since this object was made."""
        return time.monotonic() - self._saved_at

    def costs(self) -> dict[str, float]:
        """Seconds so far: `copying` and `waiting` held up training, `writing` ran beside it."""
        return {"copying": self._copying, "waiting": self._waiting, "writing": self._writing}

    def mark_best(self, step: int) -> None:
        """Points BEST at `step-STEP`, once it is written."""
        self.wait()
        write_atomically(self.folder / "BEST", _name(step))

    def wait(self) -> None:
        """Returns when nothing is being written; raises CheckpointError if the last write failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            begin = time.perf_counter()
            pending.result()
            self._waiting += time.perf_counter() - begin

    def close(self) -> None:
        """Waits, then ends the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _commit(self, step: int, snapshot: Snapshot) -> None:
        begin = time.perf_counter()
        name = _name(step)
        aside, final = self.folder / f".writing-{name}", self.folder / name
        try:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while writing
            _write(aside, snapshot)
            if final.exists():  # the same step again: of a damaged checkpoint, or of another branch of this run
                final.rename(self.folder / f".old-{name}-{time.time_ns()}")
            aside.rename(final)
            sync(self.folder)
            self._damaged.discard(name)
            write_atomically(self.folder / "LAST", name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"{final}: cannot be written: {error}; the checkpoints before it are intact, make room and resume"
            ) from error
        self._prune()
        self._writing += time.perf_counter() - begin

    def _prune(self) -> None:
        kept = {self._pointer("BEST"), *self._steps()[: self.keep]}
        for name in self._steps():
            if name not in kept:
                shutil.rmtree(self.folder / name)
        for old in self.folder.glob(".old-*"):
            shutil.rmtree(old, ignore_errors=True)

    def _steps(self) -> list[str]:
        """Names of the finished folders, newest first."""
        found = (p.name for p in self.folder.glob("step-*") if p.is_dir() and p.name not in self._damaged)
        return sorted(found, reverse=True)

    def _pointer(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text().strip() if path.is_file() else None

    def newest(self) -> Snapshot | None:
        """The newest whole checkpoint, or None where there is none.

        A damaged one is passed over with a warning. Raises CheckpointError if there are some and none can be read.
        """
        names = self._steps()
        for name in names:
            try:
                return read(self.folder / name)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
                self._damaged.add(name)
        if names:
            raise CheckpointError(f"{self.folder}: none of {len(names)} checkpoints can be read; start anew with another --out")
        return None
