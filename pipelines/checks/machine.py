"""Checks of the machine: GPUs, precision, the launcher's file, and what the processes send each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import torch
import yaml

from pipelines.checks.finding import Finding, at_least, judged, passed, skipped
from pipelines.checks.place import Place
from pipelines.setup.machine import CONFIG, why_no_gpu
from pipelines.setup.switches import switches

LEAST_ALL_REDUCE = 20.0
"""GB/s between the GPUs of one machine; PCIe 4 gives about 20, NVLink some hundred."""
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def gpus(place: Place) -> Iterator[Finding]:
    """Every GPU, whether a kernel runs on it, and the switches that decide what float32 means."""
    if not torch.cuda.is_available():
        yield skipped("GPUs", why_no_gpu())
    else:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        built = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"
        yield passed("CUDA", f"{built}, driver {nvidia_smi('driver_version') or 'unknown'}")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        right = float((torch.ones(8, 8, device=f"cuda:{number}") @ torch.ones(8, 8, device=f"cuda:{number}")).sum()) == 512
        text = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
        yield judged(f"GPU {number}", right, text, "a product on it is wrong: have the GPU examined")
        mode = nvidia_smi("compute_mode", number)
        remedy = "a second process cannot use it, so --data.decode must be named: whole (auto proves in a second process)"
        yield judged(f"GPU {number} is shared", "Exclusive" not in mode, f"compute mode {mode or 'unknown'}", remedy, "WARN")
        remedy = "something else runs on it: see nvidia-smi"
        yield judged(f"GPU {number} is free", free > 0.9 * total, f"{free / total:.0%} of its memory", remedy, "WARN")
    override = os.environ.get("NVIDIA_TF32_OVERRIDE")
    text = f"NVIDIA_TF32_OVERRIDE={override}" if override else "nothing in the environment overrides the recipe's `train.tf32`"
    yield judged("TF32", override is None, text, "unset it: it changes what float32 is behind the recipe's back", "WARN")
    yield passed("switches before a run", json.dumps(switches()))


def nvidia_smi(name: str, gpu: int = 0) -> str:
    """What NVIDIA's own tool says of a GPU; empty where it does not answer."""
    try:
        command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader", f"--id={gpu}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


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
    done = place.run(command)
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
