"""The arithmetic of a GPU is the recipe's, whatever the environment left, and stands in the manifest."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.config import RecipeError
from pipelines.setup.switches import set_switches, switches
from tests.processes import finished
from tests.runs import arguments

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # so that it is taken away again
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    set_switches(CPU)


@pytest.mark.parametrize(
    ("tf32", "matmul", "cudnn"), [("none", False, False), ("convolutions", False, True), ("all", True, True)]
)
def test_tf32_is_what_the_recipe_says_and_not_what_was_left(tf32: str, matmul: bool, cudnn: bool):
    """NVIDIA's containers begin with TF32 products, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1."""
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = not matmul, not cudnn
    set_switches(GPU, tf32=tf32)
    assert (switches()["matmul_tf32"], switches()["cudnn_tf32"]) == (matmul, cudnn)


def test_a_deterministic_run_sets_every_switch_that_bears_on_it_and_the_next_run_takes_them_back():
    set_switches(GPU, deterministic=True)
    found = switches()
    assert found["cudnn_deterministic"]
    assert found["deterministic_algorithms"]
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not found["cudnn_benchmark"]
    assert found["environment"]["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_switches(GPU)
    found = switches()
    assert not found["cudnn_deterministic"]
    assert not found["deterministic_algorithms"]
    assert found["cudnn_benchmark"]


def test_an_environment_that_forbids_tf32_is_refused_where_the_recipe_asks_for_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(RecipeError, match=r"train.tf32: 'convolutions', and NVIDIA_TF32_OVERRIDE=0 .* unset it, or say none"):
        set_switches(GPU)
    set_switches(GPU, tf32="none")
    set_switches(CPU)


def test_the_manifest_of_a_run_holds_the_switches_it_ran_under(digits: Path, tmp_path: Path):
    more = ["--train.max_steps", "1", "--train.deterministic", "true", "--train.tf32", "none"]
    container = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    finished(arguments(digits, tmp_path / "run", *more), tmp_path / "log", environment=container)
    found = json.loads((tmp_path / "run" / "manifest.json").read_text())["switches"]
    assert found == {
        "matmul_tf32": False,
        "cudnn_tf32": False,
        "cudnn_benchmark": False,
        "cudnn_deterministic": True,
        "deterministic_algorithms": True,
        "environment": {**container, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    }
