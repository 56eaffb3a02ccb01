"""What a run asks of its machine."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from pipelines.setup.machine import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
torch.ones(25_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(25_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(mode: str, **environment: str) -> tuple[str, int]:
    """What the function answered, and the page faults of ten blocks of 100 MB, each freed before the next."""
    line = [sys.executable, "-c", CODE, mode]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    answer, faults = done.stdout.split()
    return answer, int(faults)


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="not the GNU C library")
def test_freed_memory_stays_with_the_process_unless_the_user_chose_an_allocator():
    _, given_back = run("plain")
    answer, kept = run("kept")
    assert answer == "True"
    assert kept < given_back / 5
    assert run("kept", MALLOC_ARENA_MAX="2")[0] == "False"
