"""`pipelines/export.py` on the student of a real run, an architecture of the user's own file."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from distill.models.onnx_file import export_onnx
from pipelines.export import main, validation_of
from tests.processes import finished
from tests.runs import arguments

MY_MODELS = """
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from distill.models.cifar.resnet import thin

default_cfgs = generate_default_cfgs({"my_resnet8": {"num_classes": 10, "input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 1.0, "classifier": "head.fc", "first_conv": "stem.0"}})

@register_model
def my_resnet8(pretrained=False, **kwargs):
    return build_model_with_cfg(thin(8), "my_resnet8", pretrained, **kwargs)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The option that makes `my_resnet8` a name like any other."""
    file = tmp_path_factory.mktemp("mine") / "my_models.py"
    file.write_text(MY_MODELS)
    return ["--import", str(file)]


@pytest.fixture(scope="module")
def run(digits: Path, mine: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("export")
    alone = [
        "--student",
        "my_resnet8",
        "--teacher",
        "none",
        "--loss.sdd",
        "null",
        "--loss.msdcrd",
        "null",
        "--train.epochs",
        "1",
    ]
    finished(arguments(digits, folder / "run", *alone, *mine), folder / "log")
    return folder / "run"


def test_the_onnx_file_gives_the_students_logits_for_any_batch(
    run: Path, mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "student.onnx"
    assert main([str(run), "--out", str(file), *mine]) == 0
    line = capsys.readouterr().out
    assert "checked on 37 images" in line  # all validation scans of the run
    assert "same top-1 for 37" in line
    assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]
    assert b"/distill/" not in file.read_bytes()  # no stack traces with this machine's paths
    session = onnxruntime.InferenceSession(file)
    plain = timm.create_model(f"local-dir:{run / 'student'}", pretrained=True).eval()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            wanted = plain(images).numpy()
        np.testing.assert_allclose(session.run(["logits"], {"images": images.numpy()})[0], wanted, atol=1e-5)


def test_the_card_of_a_users_own_architecture_says_what_to_import(run: Path) -> None:
    card = (run / "student" / "README.md").read_text()
    assert "import timm\n# import first the file that registers my_resnet8 with timm's register_model\n\nmodel =" in card


def test_a_students_folder_is_checked_on_image_files(
    run: Path, mine: list[str], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = digits / "images" / "train", tmp_path / "student.onnx"
    assert main([str(run / "student"), "--out", str(file), "--images", str(images), *mine]) == 0
    assert f"checked on 64 images of {images}" in capsys.readouterr().out


def test_what_cannot_be_exported_or_pushed_is_one_line_and_exit_code_2(
    run: Path, mine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    file = str(tmp_path / "student.onnx")
    assert main([str(tmp_path), "--out", file]) == 2
    assert main([str(run), "--out", file, "--images", str(tmp_path / "nowhere"), *mine]) == 2
    assert main([str(run), "--out", str(tmp_path / "nowhere" / "student.onnx")]) == 2
    assert main([str(run), "--out", str(tmp_path)]) == 2
    assert main([str(run), "--out", file, "--push", "someone/student"]) == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert main([str(run), "--out", file, "--push", "someone/student", *mine]) == 2
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    assert main([str(run), "--out", file, "--import", str(broken)]) == 2
    errors = capsys.readouterr().err.splitlines()
    folders = ["make it first", f"--out: {tmp_path} is a folder; give a file in it"]
    reasons = ["there is no config.json", "no such folder", *folders, "hf auth login", "offline mode is enabled"]
    for line, words in zip(errors, [*reasons, f"--import {broken}: ModuleNotFoundError: No module"], strict=True):
        assert words in line


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"recipe": {"data": "x"}}'])
def test_a_run_whose_manifest_names_no_validation_shards_is_told_to_give_images(content: str, tmp_path: Path) -> None:
    """A run of an earlier version used to end in a KeyError."""
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json: names no validation shards, .*; give --images$"):
        validation_of(tmp_path / "student")


class OtherWhenExported(nn.Module):
    """Stands for an operator that the exporter translates wrongly."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.mean((2, 3))
        return logits * 1.01 if torch.compiler.is_exporting() else logits


def test_a_file_with_other_logits_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logits differ from PyTorch's by"):
        export_onnx(OtherWhenExported(), 5 + torch.randn(4, 3, 8, 8), tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())
