"""A node's processes decode in one way: the first of them finds out, once, and tells the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.data.dali_graph import dali_available
from distill.data.index import ShardIndex
from distill.protocols import InputSpec
from pipelines.setup import data
from pipelines.setup.data import create_eval_loader, decode_mode, find_decoding

ROOT = Path(__file__).parents[3]
SPEC = InputSpec(32, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", 1.0)

RANKS = """
import os
import sys
from accelerate import Accelerator
from distill.data.decoding import Decoding
from pipelines.setup import data

accelerator = Accelerator()

def first_finds_host(asked, index, device, threads):
    assert accelerator.process_index == 0, "only the first process of a node may try"
    return Decoding(asked, "host")

data.choose_decoding = first_finds_host
found = data.find_decoding("auto", None, accelerator, 1)
os.write(1, f"rank {accelerator.process_index} of {accelerator.num_processes}: {found.mode}\\n".encode())  # in one piece
"""
"""Two processes without a GPU: what the first one finds out is made up, the rest is real."""


def as_on_a_gpu(accelerator: Accelerator) -> Accelerator:
    """The same accelerator, which says that its device is a GPU."""
    accelerator.state.device = torch.device("cuda:0")
    return accelerator


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process knows of decoding is forgotten, before and after."""
    monkeypatch.setattr(data, "_decodings", {})


def test_the_first_process_of_a_node_finds_out_for_all(tmp_path: Path):
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, str(tmp_path / "ranks.py")], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2: host", "rank 1 of 2: host"]


@pytest.mark.skipif(not dali_available(), reason="DALI is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_no_mode_works_on_the_gpu_one_line_says_so_once(accelerator, digits, nothing_known, caplog):
    index = ShardIndex.open(digits / "val")
    found = find_decoding("auto", index, as_on_a_gpu(accelerator), 1)
    assert found.mode == "host"
    assert find_decoding("auto", index, accelerator, 1) is found
    warnings = [record.getMessage() for record in caplog.records if record.name == "distill.data"]
    assert warnings == [found.warning]
    assert "the CPU decodes what was meant for the GPU" in found.warning


def test_on_a_gpu_without_dali_one_line_says_that_the_cpu_decodes(accelerator, digits, monkeypatch, caplog):
    monkeypatch.setattr(data, "dali_available", lambda: False)
    data._warn_once.cache_clear()
    index = ShardIndex.open(digits / "val")
    for _ in range(2):
        assert decode_mode("auto", "auto", index, as_on_a_gpu(accelerator), 1) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["data.loader"]
    assert "the CPU decodes" in caplog.text


@pytest.mark.skipif(not dali_available(), reason="DALI is not installed")
@pytest.mark.parametrize("asked", ["auto", "whole", "host"])
def test_a_cpu_decodes_windows_whatever_the_recipe_says(asked, accelerator, digits, nothing_known):
    loader = create_eval_loader(ShardIndex.open(digits / "val"), SPEC, 8, accelerator, decode=asked, threads=1)
    assert loader.task.decode == "window"
    loader.close()
