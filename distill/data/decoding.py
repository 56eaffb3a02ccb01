"""The choice of how a GPU's images are decoded, proved in a child process before it is relied on.

What a GPU decodes with depends on nvJPEG and nvImageCodec as much as on the GPU: some pairs leave windows to the CPU without a
word, some end the process. So a mode is tried where a crash or a hang is a result: `try_decode` runs `decode_trial.py`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from distill.children import last_error, run_child
from distill.data.dali_graph import DecodeMode, dali_parses, dali_version
from distill.data.index import ShardIndex
from distill.data.pixels import decode_as_indexed, png_bytes
from distill.data.reader import BadSample, SampleReader

DecodeName = Literal["auto", DecodeMode]
PROOF_IMAGES = 64
TIME_LIMIT = 120.0
"""Seconds of a trial. It takes some 10: imports, CUDA, two batches beside PIL's and 3 s of decoding."""
MAX_ERROR, MEAN_ERROR = 8, 0.5
"""Levels of uint8 that a decoder may be off PIL's. Rounding of the inverse DCT and of colours is reckoned to give 4, and 0.4
in the mean. Chroma that is repeated instead of interpolated gives 31, and 0.7 in the mean (medians of photographs)."""
ROI_NVJPEG = (13, 2)
"""The first nvJPEG that decodes windows of images with halved chroma; before it, nvImageCodec leaves them to the CPU."""


class Versions(dict[str, str]):
    """Versions of what decodes, by name: dali, its cuda, nvimgcodec, nvjpeg; those that are not there are left out."""

    def number(self, name: str) -> tuple[int, ...]:
        """(major, minor) of a version; () where it is not known."""
        return tuple(int(part) for part in re.findall(r"\d+", self.get(name, ""))[:2])


@dataclass(frozen=True)
class DecodeTrial:
    """What one mode of decoding did in a process of its own; figures are None where it did not come to them."""

    mode: DecodeMode
    exit_code: int
    """The child's; negative: the signal that ended it."""
    images_per_second: float | None = None
    cpu_seconds_per_image: float | None = None
    """User and system time of all threads."""
    pil_seconds_per_image: float | None = None
    """The CPU time in which PIL decodes the whole image."""
    max_error: int | None = None
    """Largest difference from PIL's pixels, in levels."""
    mean_error: float | None = None
    error: str = ""
    """Why the mode is not to be used, in one line; empty: it works."""

    @property
    def works(self) -> bool:
        """Whether the child ended well with the right pixels."""
        return not self.error

    @property
    def on_the_cpu(self) -> bool:
        """Whether the CPU decoded, whatever the mode says: it took half of PIL's time, or more. With images of some 50 pixels
        that may be the calls alone."""
        ours, pil = self.cpu_seconds_per_image, self.pil_seconds_per_image
        return ours is not None and pil is not None and ours > 0.5 * pil


@dataclass(frozen=True)
class Decoding:
    """How a run's images are decoded, and what was tried before that was known."""

    asked: DecodeName
    mode: DecodeMode
    trials: tuple[DecodeTrial, ...] = ()
    warning: str = ""
    """One line where something is not as it was meant, as that the CPU decodes; empty: nothing to say."""

    def facts(self) -> dict[str, Any]:
        """The choice and its proof, as plain JSON for a run's manifest."""
        return {"asked": self.asked, "mode": self.mode, "trials": [asdict(trial) for trial in self.trials]}


def try_decode(
    mode: DecodeMode,
    images: Sequence[NDArray[np.uint8]],
    device: torch.device,
    threads: int,
    seconds: float = TIME_LIMIT,
) -> DecodeTrial:
    """Decodes encoded images, uint8 [size] each, in a child process: random windows and whole images, compared with PIL's, then
    random windows against the clock. Whatever happens to the child, this returns, after `seconds` at the latest."""
    with tempfile.TemporaryDirectory(prefix="distill-decode-") as folder:
        path = Path(folder) / "images.npz"
        np.savez(path, data=np.concatenate(images), lengths=np.array([len(each) for each in images]))
        command = [sys.executable, "-m", "distill.data.decode_trial", str(path)]
        command += ["--mode", mode, "--device", str(device), "--threads", str(threads)]
        code, out, err = run_child(command, seconds)
    return result_of(mode, code, out, err, seconds)


def result_of(mode: DecodeMode, code: int, out: str, err: str, seconds: float) -> DecodeTrial:
    """The trial that a child's exit code and output tell of."""
    said = last_error(err)
    if code == -signal.SIGKILL:
        return DecodeTrial(mode, code, error=f"no result within {seconds:g} s, or killed; {said}".rstrip("; "))
    if code < 0:
        name = {each.value: each.name for each in signal.Signals}.get(-code, f"signal {-code}")
        return DecodeTrial(mode, code, error=f"ended by {name}; {said}".rstrip("; "))
    try:
        figures = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return DecodeTrial(mode, code, error=said or f"exit code {code} without figures")
    if code > 0:  # after its figures: DALI was being taken down
        return DecodeTrial(mode, code, **figures, error=said or f"exit code {code}")
    wrong = figures["max_error"] > MAX_ERROR or figures["mean_error"] > MEAN_ERROR
    error = (
        f"other pixels than PIL's: by up to {figures['max_error']} levels, {figures['mean_error']:.2f} in the mean"
        f" ({MAX_ERROR} and {MEAN_ERROR} are allowed)"
    )
    return DecodeTrial(mode, code, **figures, error=error if wrong else "")


def candidates(versions: Versions) -> tuple[DecodeMode, ...]:
    """The modes that `auto` tries, the best first.

    `window` is among them only where it is safe and decodes on the GPU. nvJPEG before 13.2 leaves it to the CPU; with 13.2,
    nvImageCodec 0.9 fails on an A100 and crashes on an H100 (nvImageCodec issue 55), which 64 images need not show.
    """
    roi = versions.number("nvjpeg") >= ROI_NVJPEG and versions.number("nvimgcodec") > (0, 9)
    return ("whole", "window", "host") if roi else ("whole", "host")


def choose_decoding(
    asked: DecodeName, index: ShardIndex, device: torch.device, threads: int, seconds: float = TIME_LIMIT
) -> Decoding:
    """The mode for this split and device: on a GPU `auto` is what `proved` finds, and any other name is itself. On a CPU it is
    `window` for every name, as recipes move between machines. Raises ShardLost."""
    if device.type != "cuda":
        return Decoding(asked, "window")
    if asked != "auto":
        return Decoding(asked, asked, warning=asked_warning(asked, library_versions()))
    images = proof_images(index)
    if not images:
        return Decoding(asked, "host", warning=f"data.decode: {index.place} has no good image to try; the CPU decodes")
    return proved(candidates(library_versions()), images, device, threads, seconds)


def proved(
    modes: Sequence[DecodeMode],
    images: Sequence[NDArray[np.uint8]],
    device: torch.device,
    threads: int,
    seconds: float = TIME_LIMIT,
) -> Decoding:
    """The first of these modes that works and keeps off the CPU, with all trials that were made. Where none does: the fastest
    that works, as windows cost a CPU less than whole images; and where none works, the last one."""
    trials: list[DecodeTrial] = []
    for mode in modes:
        trials.append(try_decode(mode, images, device, threads, seconds))
        if trials[-1].works and not trials[-1].on_the_cpu:
            chosen = trials[-1]
            break
    else:
        working = [trial for trial in trials if trial.works]
        chosen = max(working, key=lambda trial: trial.images_per_second or 0.0, default=trials[-1])
    return Decoding("auto", chosen.mode, tuple(trials), warning_of(chosen, trials))


def warning_of(chosen: DecodeTrial, trials: Sequence[DecodeTrial]) -> str:
    """One line where the CPU decodes what was meant for the GPU, or where a better mode failed; else empty."""
    failed = [f"{trial.mode}: {trial.error}" for trial in trials if trial.error]
    if not failed and not chosen.on_the_cpu:
        return ""
    says = "the CPU decodes what was meant for the GPU" if chosen.mode == "host" or chosen.on_the_cpu else "decoded on the GPU"
    rate = ""
    if chosen.images_per_second is not None and chosen.cpu_seconds_per_image is not None:
        rate = f", {chosen.images_per_second:.0f} images/s, {1000 * chosen.cpu_seconds_per_image:.2f} ms of CPU time per image"
    return "; ".join([f"data.decode: {says} ({chosen.mode}){rate}", *failed])


def asked_warning(mode: DecodeMode, versions: Versions) -> str:
    """One line where a mode that was asked for by name is no good with these versions; else empty."""
    if mode != "window" or "window" in candidates(versions):
        return ""
    if versions.number("nvjpeg") >= ROI_NVJPEG:
        return (
            f"data.decode: window with nvJPEG {versions['nvjpeg']} and nvImageCodec {versions.get('nvimgcodec', 'unknown')}"
            " is known to crash; `whole` does not"
        )
    return (
        f"data.decode: the CPU decodes what was meant for the GPU: nvJPEG {versions.get('nvjpeg', 'unknown')} decodes no"
        " windows of images with halved chroma; `whole` decodes on the GPU"
    )


def proof_images(index: ShardIndex, count: int = PROOF_IMAGES) -> list[NDArray[np.uint8]]:
    """Encoded images spread over the split, as DALI is fed with them; bad samples are left out. Raises ShardLost."""
    reader, images = SampleReader(index), []
    samples = np.unique(np.arange(count) * index.num_samples // count) if index.num_samples else np.zeros(0, np.int64)
    try:
        for sample in samples.tolist():
            try:
                data = reader.read(sample)
                image = decode_as_indexed(data.tobytes(), size := index.sizes(sample).tolist())
            except BadSample:
                continue
            images.append(data if dali_parses(data, size) else png_bytes(image))
    finally:
        reader.close()
    return images


def library_versions() -> Versions:
    """The versions of DALI, of the CUDA that it is built for, of nvImageCodec and of nvJPEG; empty without DALI."""
    found = dali_version()
    if found is None:
        return Versions()
    dali, cuda = found
    versions = Versions(dali=dali, dali_cuda=f"{cuda // 1000}.{cuda % 1000 // 100}")
    with suppress(importlib.metadata.PackageNotFoundError):  # not from a wheel: its own number does not tell 0.10 from 1.0
        versions["nvimgcodec"] = importlib.metadata.version(f"nvidia-nvimgcodec-cu{cuda // 1000}")
    nvjpeg = nvjpeg_version(cuda // 1000)
    return versions if nvjpeg is None else Versions(**versions, nvjpeg=nvjpeg)


def nvjpeg_version(cuda_major: int) -> str | None:
    """The version that nvJPEG says of itself; None where the library is not found."""
    for path in nvjpeg_files(cuda_major):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        parts = [ctypes.c_int(-1) for _ in range(3)]
        # libraryPropertyType of CUDA's library_types.h: 0 major, 1 minor, 2 patch
        if not any(library.nvjpegGetProperty(number, ctypes.byref(part)) for number, part in enumerate(parts)):
            return ".".join(str(part.value) for part in parts)
    return None


def nvjpeg_files(cuda_major: int) -> list[str]:
    """The nvJPEG that this process has loaded, or else where the loader looks for DALI's, in its order."""
    name = f"libnvjpeg.so.{cuda_major}"
    maps = Path("/proc/self/maps")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if name in line} if maps.exists() else set()
    asked = [Path(folder) / name for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    wheels = [Path(entry) / "nvidia" for entry in sys.path]
    folders = [wheel / where for wheel in wheels for where in ("nvjpeg/lib", f"cu{cuda_major}/lib")]
    installed = [folder / name for folder in (*folders, Path("/usr/local/cuda/lib64"))]
    return [*sorted(loaded), *(str(path) for path in (*asked, *installed) if path.is_file()), name]
