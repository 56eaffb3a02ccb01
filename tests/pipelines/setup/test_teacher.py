"""The teacher before the first step: what it computes in fewer bits, and that it is as good as the recipe says."""

from pathlib import Path

import pytest
import torch

from distill.config import RecipeError
from distill.models.teacher import FrozenTeacher
from distill.protocols import Needs
from distill.recipe import Teacher
from pipelines.setup.models import check_graphs, teacher_stream
from pipelines.setup.teacher import check_top1
from tests.distill.models.model_support import PYRAMID, backbone
from tests.processes import finished
from tests.runs import arguments, metrics, recipe_of

CPU = torch.device("cpu")
NEEDS = Needs(region_logits=(PYRAMID,), region_features=(PYRAMID,), stages=(-1,))
VIT = {"img_size": 32, "patch_size": 8, "depth": 2}


@pytest.mark.parametrize(("name", "kwargs"), [("cifar_resnet14", {}), ("vit_tiny_patch16_224", VIT)])
def test_bf16_weights_give_exactly_what_bf16_autocast_gives(name: str, kwargs: dict):
    """Logits, region logits and maps, bit for bit, whatever the precision of the student; region features are float32."""
    teacher = backbone(name, 32, NEEDS, **kwargs).eval().requires_grad_(False)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(images)
    with torch.no_grad():
        assert FrozenTeacher(teacher, torch.channels_last)(images).logits.dtype is torch.float32
    served = FrozenTeacher(teacher, torch.channels_last, "bf16")
    with torch.no_grad():
        found = served(images)
        with torch.autocast("cpu", torch.bfloat16):
            again = served(images)
    assert found.logits.dtype is torch.bfloat16
    for outputs in (found, again):
        assert torch.equal(outputs.logits, wanted.logits)
        assert torch.equal(outputs.region_logits[PYRAMID], wanted.region_logits[PYRAMID])
        assert torch.equal(outputs.region_features[PYRAMID], wanted.region_features[PYRAMID])
        assert torch.equal(outputs.feature_map, wanted.feature_map)


def test_a_teacher_worse_than_the_recipe_says_stops_the_run_before_its_first_step(digits: Path, tmp_path: Path):
    out, log = tmp_path / "run", tmp_path / "log"
    asked = ["--teacher.evaluate", "true", "--teacher.expected_top1", "90", "--teacher.tolerance", "20"]
    finished(arguments(digits, out, *asked), log, codes=2)
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "teacher cifar_resnet14: top-1 " in line
    assert "expected 90.00 +- 20.00 (teacher.expected_top1); usual reasons: weights of another tag" in line
    assert not (out / "metrics.jsonl").is_file() or not metrics(out)


def test_a_top1_within_the_tolerance_passes_and_the_log_says_what_it_was_compared_with():
    vouched = Teacher(name="resnet34", expected_top1=73.31)
    assert check_top1(vouched, 72.4) == "expected 73.31 +- 1.00 (teacher.expected_top1)"
    with pytest.raises(RecipeError, match=r"top-1 72\.30 on the validation shards, expected 73\.31 \+- 1\.00"):
        check_top1(vouched, 72.3)
    assert "compared with nothing" in check_top1(Teacher(name="resnet34"), 1.0)


def test_two_cuda_graphs_at_once_are_refused(digits: Path, tmp_path: Path):
    graphs = ["--train.overlap_teacher", "true", "--train.compile_mode", "reduce-overhead", "--train.compile"]
    with pytest.raises(RecipeError, match=r"train\.overlap_teacher: reduce-overhead .* compile one model"):
        teacher_stream(recipe_of(digits, tmp_path, *graphs, "both"), CPU)
    assert teacher_stream(recipe_of(digits, tmp_path, *graphs, "student"), CPU) is None


def test_cuda_graphs_over_several_micro_batches_are_refused(digits: Path, tmp_path: Path):
    several = ["--train.accumulate", "3", "--train.compile_mode"]
    with pytest.raises(RecipeError, match=r"train\.compile_mode: max-autotune .* train\.accumulate 3; say .* default"):
        check_graphs(recipe_of(digits, tmp_path, "--train.compile", "student", *several, "max-autotune"))
    check_graphs(recipe_of(digits, tmp_path, "--train.compile", "student", *several, "default"))
    check_graphs(recipe_of(digits, tmp_path, *several, "reduce-overhead"))  # nothing is compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_a_stream_of_its_own_changes_no_output():
    device = torch.device("cuda")
    teacher = backbone("cifar_resnet14", 32, NEEDS).eval().requires_grad_(False).to(device)
    plain = FrozenTeacher(teacher, torch.channels_last)
    beside = FrozenTeacher(teacher, torch.channels_last, stream=torch.cuda.Stream(device))
    batches = torch.rand(8, 64, 3, 32, 32, device=device)
    with torch.no_grad():
        wanted = [plain(images).region_logits[PYRAMID].clone() for images in batches]
        found = []
        for images in batches:
            outputs = beside(images)
            beside.join()
            found.append(outputs.region_logits[PYRAMID].clone())
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_all_of_it_by_two_processes(digits: Path, tmp_path: Path):
    """bf16 weights beside a float32 student, accumulation; the overlap says that it has no effect."""
    options = ["--train.channels_last", "false", "--train.overlap_teacher", "true", "--teacher.precision", "bf16"]
    more = [*options, "--train.accumulate", "2", "--train.max_steps", "2", "--teacher.evaluate", "true"]
    job = finished(arguments(digits, tmp_path / "run", *more), tmp_path / "log", world_size=2)
    assert job.text().count("train.overlap_teacher: no effect") == 1
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss/total" in line] == [1, 2]
