"""`train.compile` by the main command: the losses of eager training."""

import os
import shutil
from pathlib import Path

import pytest

from tests.processes import finished, start
from tests.runs import arguments, metrics


@pytest.mark.skipif(not os.environ.get("TEST_COMPILE"), reason="takes minutes of a core; `make test-compile` runs it")
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
def test_a_compiled_pair_trains_with_the_losses_of_the_eager_one(digits: Path, tmp_path: Path):
    """Inductor for one small pair: it takes half a minute of a core. Other mechanisms, and two processes: tests/models."""
    few = ["--train.max_steps", "2", "--teacher", "cifar_resnet8", "--loss.msdcrd.stages", "last"]
    finished(arguments(digits, tmp_path / "eager", *few), tmp_path / "eager.log")
    compiling = arguments(digits, tmp_path / "compiled", *few, "--train.compile", "both")
    job = start(compiling, tmp_path / "compiled.log", environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"})
    assert job.wait(600) == [0], job.text()
    assert "compiled: 2 graphs, 0 graph breaks" in job.text()
    eager, compiled = metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")
    assert [line["step"] for line in compiled if "loss/total" in line] == [1, 2]
    for a, b in zip(eager, compiled, strict=True):
        for name in (n for n in a if n.startswith("loss/") or n == "eval/loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["step"], name)
