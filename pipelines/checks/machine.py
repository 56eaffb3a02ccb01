"""Checks of the installation: versions, GPUs, precision, the launcher's file, and what the processes send each other."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import torch
import yaml
from packaging.requirements import Requirement

from distill.data.decoding import library_versions
from pipelines.checks.finding import Finding, at_least, judged, passed, skipped
from pipelines.checks.place import ROOT, Place
from pipelines.setup.machine import CONFIG, why_no_gpu
from pipelines.setup.switches import switches

LEAST_ALL_REDUCE = 20.0
"""GB/s between the GPUs of one machine; PCIe 4 gives about 20, NVLink some hundred."""
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def installed(name: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(place: Place) -> Iterator[Finding]:
    """Python's, every package's against pyproject.toml, and those of what decodes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["train"]]]
    yield passed("python", f"{sys.version.split()[0]}, {sys.executable}")
    found = {each.name: installed(each.name) for each in asked}
    wrong = [each for each in asked if (version := found[each.name]) is None or not each.specifier.contains(version, True)]
    for each in wrong:
        text = f"{found[each.name] or 'not installed'}, and pyproject.toml asks for {each.specifier or 'any'}"
        yield Finding("FAIL", each.name, text, f"pip install '{each}'")
    others = ", ".join(f"{each.name} {found[each.name]}" for each in asked if each not in wrong)
    yield passed("packages", f"{others}")
    yield from dali_versions()


def dali_versions() -> Iterator[Finding]:
    """DALI, and that only one of its two builds is installed."""
    builds = [name for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if installed(name)]
    if len(builds) > 1:
        remedy = "pip uninstall both, then install the one of this driver's CUDA"
        yield Finding("FAIL", "DALI", f"{' and '.join(builds)} are installed over each other", remedy)
        return
    known = library_versions()
    if not known:
        remedy = "pip install '.[train,dali-cuda130]' (or dali-cuda120 for drivers of CUDA 12); without it PIL decodes"
        yield Finding("WARN", "DALI", "not installed", remedy)
        return
    yield passed("DALI", ", ".join(f"{name} {version}" for name, version in known.items()))


def gpus(place: Place) -> Iterator[Finding]:
    """Every GPU, whether a kernel runs on it, and the switches that decide what float32 means."""
    if not torch.cuda.is_available():
        yield skipped("GPUs", why_no_gpu())
    else:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield passed("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}, driver {driver()}")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        right = float((torch.ones(8, 8, device=f"cuda:{number}") @ torch.ones(8, 8, device=f"cuda:{number}")).sum()) == 512
        text = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        yield judged(f"GPU {number}", right, text, "a product on it is wrong: have the GPU examined")
        remedy = "something else runs on it: see nvidia-smi"
        yield judged(f"GPU {number} is free", free > 0.9 * total, f"{free / total:.0%} of its memory", remedy, "WARN")
    override = os.environ.get("NVIDIA_TF32_OVERRIDE")
    text = f"NVIDIA_TF32_OVERRIDE={override}" if override else "nothing in the environment overrides the recipe's `train.tf32`"
    yield judged("TF32", override is None, text, "unset it: it changes what float32 is behind the recipe's back", "WARN")
    yield passed("switches before a run", json.dumps(switches()))


def driver() -> str:
    """The NVIDIA driver's version, as its own tool says."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown (nvidia-smi does not answer)"


def launcher(place: Place) -> Iterator[Finding]:
    """The file for `accelerate launch` against the machine."""
    told, gpus_here = yaml.safe_load(CONFIG.read_text()), torch.cuda.device_count()
    per_machine = told["num_processes"] // told["num_machines"]
    text = f"{per_machine} processes a machine, {gpus_here} usable GPUs here"
    command = f"accelerate launch --config_file {CONFIG.name} --num_processes {gpus_here} pipelines/imagenet.py ..."
    if not gpus_here:
        command = "without a GPU: python pipelines/imagenet.py ..."
    yield judged(CONFIG.name, per_machine == gpus_here, text, command, "WARN")
    names = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND")
    left = {name: os.environ[name] for name in names if name in os.environ}
    yield judged("environment", not left, f"{left or 'no variable of a launcher is set'}", "unset them before a launch", "WARN")
    text = "a run without progress ends after train.timeout_minutes (10); a collective after twice that"
    waits = {name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_", "GLOO_"))}
    yield passed("time-outs", f"{text}; set here: {waits}" if waits else text)


def network(place: Place) -> Iterator[Finding]:
    """An all-reduce between this machine's processes: NCCL for its GPUs, gloo for two processes of a CPU."""
    count = torch.cuda.device_count() if place.on_gpu else 2
    command = [*LAUNCH, str(count), "-m", "pipelines.checks.all_reduce"]
    done = subprocess.run(command, capture_output=True, text=True, env=place.environment())
    name = f"all-reduce of {count} {'GPUs by NCCL' if place.on_gpu else 'CPU processes by gloo'}"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        yield Finding("FAIL", name, f"exit code {done.returncode}: {said}", "NCCL_DEBUG=INFO tells more")
        return
    figures = json.loads(lines[-1])
    text = f"{figures['gigabytes_per_second']:.1f} GB/s, {figures['latency_ms']:.2f} ms for one number"
    yield judged(name, figures["right"], text, "the sums are wrong: do not train on this machine")
    if place.on_gpu and count > 1:
        yield at_least("rate", figures["gigabytes_per_second"], LEAST_ALL_REDUCE, "GB/s", "see nvidia-smi topo -m")
    if place.on_gpu and count == 1:
        yield skipped("between GPUs", "there is one GPU")
