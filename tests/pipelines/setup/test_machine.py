"""What a run asks of its machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.config import RecipeError
from pipelines.setup.machine import check_processes
from tests.processes import finished
from tests.runs import arguments

ROOT = Path(__file__).parents[3]
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "false"}

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


@pytest.mark.parametrize(("local", "world", "gpus"), [(1, 1, 0), (1, 1, 8), (8, 8, 8), (2, 2, 8), (8, 16, 8), (1, 4, 1)])
def test_processes_that_have_a_gpu_each_and_a_single_one_are_served(local: int, world: int, gpus: int):
    check_processes(local, world, gpus)


@pytest.mark.parametrize(
    ("local", "world", "gpus", "said"),
    [
        (8, 8, 1, r"^8 processes .* 1 usable GPU; .*accelerate launch --config_file \S+ --num_processes 1 "),
        (8, 8, 4, r"^8 processes .* 4 usable GPUs; .* --num_processes 4 "),
        (8, 16, 4, r" --num_processes 8 "),  # two machines, four each
        (8, 8, 0, r"^8 processes .* alone on the CPU.* python .* ACCELERATE_USE_CPU=true torchrun .* --nproc-per-node 8 "),
        (1, 2, 0, r"^2 processes .* alone on the CPU"),
    ],
)
def test_more_processes_than_gpus_are_refused_with_the_command_that_works(local: int, world: int, gpus: int, said: str):
    with pytest.raises(RecipeError, match=said):
        check_processes(local, world, gpus)


def test_two_training_processes_that_find_no_gpu_are_refused_and_not_two_runs(digits: Path, tmp_path: Path):
    """Each was rank 0 of 1: the second found the run's folder taken, the first trained on the CPU."""
    job = finished(arguments(digits, tmp_path / "run"), tmp_path / "log", world_size=2, codes=2, environment=NO_GPU)
    [line] = job.text().splitlines()
    assert line.startswith("error: 2 processes were started, and PyTorch ")
    assert not (tmp_path / "run").exists()


def test_the_shipped_yaml_without_a_gpu_is_refused_in_one_line(digits: Path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml"]
    script = ["pipelines/evaluate.py", "--model", "cifar_resnet8", "--weights", "random", "--val", str(digits / "val")]
    line = [*launch, "--num_processes", "2", *script]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **NO_GPU}, timeout=300)
    assert done.returncode != 0
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said.endswith(f"--nproc-per-node 2 {' '.join(script)}")
    assert "(exitcode: 2)" in done.stderr


def test_a_benchmark_of_several_processes_without_a_gpu_is_refused_too():
    ranks = {**os.environ, **NO_GPU, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "pipelines/benchmark.py"], cwd=ROOT, capture_output=True, text=True, env=ranks)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 2 processes were started")
