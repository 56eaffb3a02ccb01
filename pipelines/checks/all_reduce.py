"""The processes of the network check: each joins, sums, and the first prints the rates as JSON. Started by torchrun."""

from __future__ import annotations

import json
import signal
import time

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

from distill.children import end_with_parent

BYTES, TURNS = 64 * 2**20, 10


def main() -> None:
    """Sums 64 MiB and one number over all processes, ten times each."""
    end_with_parent(signal.SIGKILL)  # torchrun's workers have sessions of their own
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    device, world = state.device, state.num_processes
    if not distributed.is_initialized():  # one process: Accelerate makes no group
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method="env://")
    seconds = {}
    for count in (1, BYTES // 4):
        numbers = torch.ones(count, device=device)
        distributed.all_reduce(numbers)
        right = bool((numbers == world).all())
        start = time.perf_counter()
        for _ in range(TURNS):
            distributed.all_reduce(numbers)
        float(numbers[0])  # waits for the device
        seconds[count] = (time.perf_counter() - start) / TURNS
    if state.is_main_process:
        rate = 2 * (world - 1) / world * BYTES / seconds[BYTES // 4] / 1e9
        print(json.dumps({"gigabytes_per_second": rate, "latency_ms": 1e3 * seconds[1], "right": right}), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
