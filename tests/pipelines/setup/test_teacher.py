"""The teacher in fewer bits: what it computes, which requests are refused, and how much it may decide differently."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.batch_transform import to_pixels
from distill.config import RecipeError
from distill.evaluation import evaluate
from distill.models.teacher import ServedTeacher
from distill.protocols import Needs
from distill.recipe import Teacher
from pipelines.setup.data import build_eval_loader, build_splits
from pipelines.setup.models import check_precision, teacher_stream
from pipelines.setup.teacher import LabelledBy, check_agreement
from tests.distill.models.model_support import PYRAMID, backbone
from tests.processes import finished
from tests.runs import arguments, metrics, recipe_of

CPU = torch.device("cpu")
NEEDS = Needs(region_logits=(PYRAMID,), region_features=(PYRAMID,), stages=(-1,))
VIT = {"img_size": 32, "patch_size": 8, "depth": 2}
TORCHAO = importlib.util.find_spec("torchao") is not None
without_torchao = pytest.mark.skipif(not TORCHAO, reason="torchao is not installed (extra `quantize`)")


@pytest.mark.parametrize(("name", "kwargs"), [("cifar_resnet14", {}), ("vit_tiny_patch16_224", VIT)])
def test_bf16_weights_give_exactly_what_bf16_autocast_gives(name: str, kwargs: dict):
    """Logits, region logits and maps, bit for bit, whatever the precision of the student; region features are float32."""
    teacher = backbone(name, 32, NEEDS, **kwargs).eval().requires_grad_(False)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(images)
    served = ServedTeacher(teacher, torch.channels_last)
    with torch.no_grad():
        assert served(images).logits.dtype is torch.float32
    assert served.lower("bf16", CPU) is None
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


@pytest.mark.parametrize(
    ("name", "precision", "words"),
    [
        ("vit_tiny_patch16_224", "fp8", ("'fp8'", "8.9", "cpu")),
        # its only Linear layer has ten outputs
        ("cifar_resnet14", "int8", ("'int8'", "would quantise nothing", "multiples of 8", "bf16")),
        pytest.param(
            *("vit_tiny_patch16_224", "int8", ("'int8'", "not installed", "distill[quantize]")),
            marks=pytest.mark.skipif(TORCHAO, reason="torchao is installed"),
        ),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_in_one_line(name: str, precision: str, words: tuple[str, ...]):
    teacher = backbone(name, 32, Needs(), **(VIT if name.startswith("vit") else {}))
    with pytest.raises(RecipeError) as refused:
        check_precision(Teacher(name=name, precision=precision), teacher, CPU)
    message = str(refused.value)
    assert "\n" not in message
    assert [word for word in ("teacher.precision", *words) if word not in message] == []


def test_agreement_is_the_share_of_all_validation_images_with_the_same_decision(
    digits: Path, tmp_path: Path, accelerator: Accelerator
):
    asked = recipe_of(digits, tmp_path)
    ours, theirs = (backbone("cifar_resnet14", 32, Needs(), seed=seed).eval() for seed in (0, 1))
    val = build_splits(asked, accelerator).val

    def decide(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return theirs(to_pixels(images)).logits.argmax(dim=1)

    loader = build_eval_loader(asked, val, ours.input_spec, accelerator)
    same = images = 0
    for batch in loader.epoch(0):
        with torch.no_grad():
            same += int((ours(to_pixels(batch.images)).logits.argmax(dim=1) == decide(batch.images)).sum())
        images += len(batch.labels)
    found = evaluate(ours, LabelledBy(loader, decide), accelerator)
    assert found["images"] == images == val.num_samples
    assert found["top1"] == pytest.approx(100 * same / images)
    assert evaluate(theirs, LabelledBy(loader, decide), accelerator)["top1"] == 100
    loader.close()


def test_too_little_agreement_is_refused_with_both_numbers():
    asked = Teacher(name="a_teacher", precision="int8")
    assert "99.50 % asked" in check_agreement(asked, 99.5, torch.bfloat16)
    with pytest.raises(RecipeError, match=r"int8 with the teacher in bf16 99\.49 %, .*least_agreement asks for 99\.50 %"):
        check_agreement(asked, 99.49, torch.bfloat16)
    with pytest.raises(RecipeError, match="unquantised"):
        check_agreement(asked, 99.49, None)


@without_torchao
def test_int8_reaches_the_linear_layers_and_the_regions(digits: Path):
    """Weights take half the bytes of bf16, convolutions stay, every output is near that of bf16."""
    teacher = backbone("vit_tiny_patch16_224", 32, NEEDS, **VIT).eval().requires_grad_(False)
    served = ServedTeacher(teacher, torch.contiguous_format)
    images = torch.rand(32, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = served(images)
    found = served.lower("int8", CPU)
    assert found is not None
    # four in each of two blocks; not the head, which has ten outputs, nor the patches' convolution
    assert (found.layers, found.of_layers) == (8, 10)
    assert 0.9 < found.share < 1
    with torch.no_grad():
        after = served(images)
    for a, b in ((before.logits, after.logits), (before.region_logits[PYRAMID], after.region_logits[PYRAMID])):
        assert a.dtype == b.dtype
        assert not torch.equal(a, b)
        assert (a.float() - b.float()).abs().max() < 0.1 * a.float().abs().max()


@without_torchao
def test_an_int8_teacher_trains_once_its_agreement_is_known(digits: Path, tmp_path: Path):
    """By the main command."""
    vit = ["--teacher", "vit_tiny_patch16_224", "--teacher.model_kwargs", "{img_size: 32, patch_size: 8, depth: 2}"]
    asked = [*vit, "--teacher.precision", "int8", "--train.max_steps", "2", "--loss.msdcrd", "null"]
    job = finished(arguments(digits, tmp_path / "run", *asked, "--teacher.least_agreement", "50"), tmp_path / "log")
    assert "int8 in its Linear layers, 8 of 10 layers" in job.text()
    assert "top-1 agreement of int8 with the teacher in bf16" in job.text()
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss/total" in line] == [1, 2]


def test_two_cuda_graphs_at_once_are_refused(digits: Path, tmp_path: Path):
    graphs = ["--train.overlap_teacher", "true", "--train.compile_mode", "reduce-overhead", "--train.compile"]
    with pytest.raises(RecipeError, match=r"train\.overlap_teacher: reduce-overhead .* compile one model"):
        teacher_stream(recipe_of(digits, tmp_path, *graphs, "both"), CPU)
    assert teacher_stream(recipe_of(digits, tmp_path, *graphs, "student"), CPU) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_a_stream_of_its_own_changes_no_output():
    device = torch.device("cuda")
    teacher = backbone("cifar_resnet14", 32, NEEDS).eval().requires_grad_(False).to(device)
    plain = ServedTeacher(teacher, torch.channels_last)
    beside = ServedTeacher(teacher, torch.channels_last, torch.cuda.Stream(device))
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
