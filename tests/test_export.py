"""`pipelines/export.py` on the student of a real run."""

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
from pipelines.export import main
from tests.processes import finished
from tests.runs import arguments


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("export")
    alone = ["--teacher", "none", "--loss.sdd", "null", "--loss.msdcrd", "null", "--train.epochs", "1"]
    finished(arguments(digits, folder / "run", *alone), folder / "log")
    return folder / "run"


def test_the_onnx_file_gives_the_students_logits_for_any_batch(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "student.onnx"
    assert main([str(run), "--out", str(file)]) == 0
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


def test_a_students_folder_is_checked_on_image_files(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, file = digits / "images" / "train", tmp_path / "student.onnx"
    assert main([str(run / "student"), "--out", str(file), "--images", str(images)]) == 0
    assert f"checked on 64 images of {images}" in capsys.readouterr().out


def test_what_cannot_be_exported_or_pushed_is_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    file = str(tmp_path / "student.onnx")
    assert main([str(tmp_path), "--out", file]) == 2
    assert main([str(run), "--out", file, "--images", str(tmp_path / "nowhere")]) == 2
    assert main([str(run), "--out", str(tmp_path / "nowhere" / "student.onnx")]) == 2
    assert main([str(run), "--out", file, "--push", "someone/student"]) == 2
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert main([str(run), "--out", file, "--push", "someone/student"]) == 2
    errors = capsys.readouterr().err.splitlines()
    for line, words in zip(
        errors,
        ("there is no config.json", "no such folder", "make it first", "hf auth login", "offline mode is enabled"),
        strict=True,
    ):
        assert words in line


class OtherWhenExported(nn.Module):
    """Stands for an operator that the exporter translates wrongly."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.mean((2, 3))
        return logits * 1.01 if torch.compiler.is_exporting() else logits


def test_a_file_with_other_logits_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="logits differ from PyTorch's by"):
        export_onnx(OtherWhenExported(), 5 + torch.randn(4, 3, 8, 8), tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())
