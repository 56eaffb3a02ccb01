"""Files that hold no weights, or weights of something else: named by what they are, before anything else is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf

from distill.models.build import create_model
from distill.models.export import export_student
from distill.models.input_spec import input_spec_of
from pipelines.evaluate import main as evaluate
from pipelines.export import main as export
from tests.processes import finished
from tests.runs import arguments

NAME = "cifar_resnet8"


def state(num_classes: int = 10) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: value.clone() for key, value in create_model(NAME, num_classes=num_classes).state_dict().items()}


def not_finite() -> dict[str, torch.Tensor]:
    values = state()
    values["stages.1.blocks.0.bn1.weight" if "stages.1.blocks.0.bn1.weight" in values else next(iter(values))][0] = float("nan")
    return values


def torchscript(file: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.pth": (lambda file: file.write_bytes(b""), "is empty (0 bytes)"),
    "pointer.pth": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "pointer.safetensors": (lambda file: file.write_text("version https://git-lfs.github.com/"), "`git lfs pull` fetches"),
    "page.pth": (lambda file: file.write_text("<html>404</html>"), "it is a web page"),
    "keras.pth": (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "another format, HDF5"),
    "packed.pth": (lambda file: file.write_bytes(b"\x1f\x8b" + bytes(99)), "compressed with gzip"),
    "text.pth": (lambda file: file.write_text("epoch 1, loss 2.3"), "starts with b'epoch 1,'"),
    "torch.safetensors": (lambda file: torch.save(state(), file), "another format, PyTorch's; name it torch.pth"),
    "safe.pth": (lambda file: save_file(state(), file), "another format, safetensors; name it safe.safetensors"),
    "whole.pth": (lambda file: torch.save(create_model(NAME, num_classes=10), file), "holds Python objects (distill."),
    "script.pt": (torchscript, "a TorchScript archive; save model.state_dict()"),
    "cut.pth": (lambda file: (torch.save(state(), file), file.write_bytes(file.read_bytes()[:9000])), "damaged or cut short"),
    "nan.pth": (lambda file: torch.save(not_finite(), file), "hold values that are not finite, the first is "),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_weights_is_named_by_what_it_is(
    name: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_accelerate: None
):
    make, words = FILES[name]
    make(tmp_path / name)
    asked = ["--model", NAME, "--val", str(digits / "val"), "--json", str(tmp_path / "figures.json")]
    assert evaluate([*asked, "--weights", str(tmp_path / name)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / name}: ")
    assert words in line
    assert "weights_only" not in line
    assert not (tmp_path / "figures.json").exists()


def test_weights_that_are_not_finite_are_refused_as_student_as_teacher_and_by_the_export(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = create_model(NAME, num_classes=10)
    export_student(model, tmp_path / "student", input_spec=input_spec_of(model))
    values = load_file(tmp_path / "student/model.safetensors")
    values["head.fc.bias"][0] = float("inf")
    save_file(values, tmp_path / "student/model.safetensors", metadata={"format": "pt"})
    for role in (["--student.initial_weights"], ["--teacher", NAME, "--teacher-weights"]):
        out = tmp_path / role[0].strip("-")
        job = finished(arguments(digits, out, *role, str(tmp_path / "student")), tmp_path / "log", codes=2)
        assert "tensors hold values that are not finite, the first is head.fc.bias" in job.text()
        assert not (out / "manifest.json").exists()
    said = export([str(tmp_path / "student"), "--out", str(tmp_path / "net.onnx"), "--images", str(digits / "val")])
    assert said == 2
    assert "the first is head.fc.bias" in capsys.readouterr().err
    assert not (tmp_path / "net.onnx").exists()


def test_weights_of_other_classes_start_a_student_with_a_fresh_classifier_on_request(digits: Path, tmp_path: Path):
    torch.save(state(num_classes=7), tmp_path / "seven.pth")
    one_step = ["--student.initial_weights", str(tmp_path / "seven.pth"), "--train.max_steps", "1", "--train.epochs", "1"]
    job = finished(arguments(digits, tmp_path / "refused", *one_step), tmp_path / "log", codes=2)
    assert "weights for 7 classes, the data have 10; " in job.text()
    assert "student.fresh_head true" in job.text()
    tiny = ["--optim.learning_rate", "1e-9", "--optim.weight_decay", "0", "--student.fresh_head", "true"]
    finished(arguments(digits, tmp_path / "run", *one_step, *tiny), tmp_path / "log")
    trained = load_file(tmp_path / "run/student/model.safetensors")
    assert json.loads((tmp_path / "run/student/config.json").read_text())["num_classes"] == 10
    same = [key for key, value in state(7).items() if value.shape == trained[key].shape and value.is_floating_point()]
    body = [key for key in same if "running" not in key]
    assert len(trained["head.fc.weight"]) == 10
    assert all(torch.allclose(trained[key], state(7)[key], atol=1e-5) for key in body)


def test_weights_for_grey_images_are_refused_by_evaluation_and_export(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh_accelerate: None
):
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_config_for_hf(model, str(tmp_path / "config.json"))
    assert evaluate(["--model", "resnet10t", "--weights", str(tmp_path), "--val", str(digits / "val")]) == 2
    assert export([str(tmp_path), "--out", str(tmp_path / "net.onnx"), "--images", str(digits / "val")]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: ResNet takes 1 channels; only RGB images are served"] * 2
    assert not (tmp_path / "net.onnx").exists()
