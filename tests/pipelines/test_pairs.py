"""`pipelines/pairs.py`: the real command."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from distill.losses import LOSSES
from distill.models.describe import count_parameters, create_outline
from pipelines.measure import compatibility as pairs_matrix
from pipelines.pairs import main

ROOT = Path(__file__).parents[2]


def pairs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipelines" / "pairs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_explain_says_what_a_pair_gives_costs_and_can_be_trained_with() -> None:
    done = pairs("explain", "resnet34", "cifar_resnet8x4", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["teacher"]["parameters"] == 21_797_672
    assert report["student"]["parameters"] == 1_464_840  # 1,233,540 at 100 classes and 900 more rows of 257
    assert 7.2e9 < report["teacher"]["flops"] < 7.5e9  # 3.67 GMAC at 224 px
    assert [stage[0] for stage in report["teacher"]["facts"]["stages"]] == [64, 128, 256, 512]
    assert report["losses"].keys() == LOSSES.keys()
    assert report["losses"]["cross_entropy"] == "student: logits"
    assert report["losses"]["kd"] == "teacher: logits; student: logits"
    assert report["losses"]["sdd"] == "teacher: region logits by pool; student: region logits by pool"
    assert report["losses"]["msdcrd"] == "teacher: region logits by pool and stages -1, -2, -3; student: stages -1, -2, -3"
    assert report["trained_parameters"].keys() >= {"msdcrd", "mgd", "reviewkd", "ofd", "semckd", "ctkd"}
    assert 0 < report["teacher_share_of_step"] < 1
    assert any("resnet34.tv_in1k" in text for text in report["warnings"])
    assert any("inputs differ (224 and 32 px)" in text for text in report["warnings"])


def test_billions_of_parameters_are_looked_at_in_little_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    outline = create_outline("vit_giant_patch14_clip_224", num_classes=1000)
    assert count_parameters(outline) == 1_012_612_840
    assert process.memory_info().rss - before < 500 * 2**20  # in float32 they would take 3.8 GiB


def test_a_request_that_cannot_be_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", "resnt34", "resnet18"]) == 2
    assert main(["matrix", "--pattern", "nothing*", "--out", str(tmp_path / "table.csv")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "error: resnt34: no architecture of timm; did you mean resnet34, resnet34d, skresnet34?",
        "error: --pattern nothing*: no architecture of timm matches; try '*resnet*'",
    ]


def test_the_matrix_goes_on_where_it_stopped_and_writes_a_page(tmp_path: Path) -> None:
    table, page = tmp_path / "table.csv", tmp_path / "table.md"
    assert main(["matrix", "--pattern", "cifar_resnet8", "--out", str(table)]) == 0
    second = pairs("matrix", "--pattern", "cifar_resnet8*", "--out", str(table), "--page", str(page))
    assert second.returncode == 0, second.stderr
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["cifar_resnet8", "cifar_resnet8_224", "cifar_resnet8x4", "cifar_resnet8x4_224"]
    assert {row["mechanism"] for row in rows} == {"pool"}
    assert all(float(row["whole_image_difference"]) < 1e-4 for row in rows)
    assert "cifar_resnet8:" not in second.stdout  # its row was there
    assert "4 of 4 architectures checked: pool 4" in page.read_text()


def test_an_expensive_architecture_is_checked_on_smaller_images_and_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_matrix, "EXPENSIVE", 1e9)  # 10,000 parameters at 316 px
    table, page = tmp_path / "table.csv", tmp_path / "table.md"
    for pattern in ("crossvit_9_240", "fastvit_t8", "vit_tiny_patch16_384"):
        assert main(["matrix", "--pattern", pattern, "--out", str(table), "--page", str(page)]) == 0
    with table.open(newline="") as file:
        rows = {row["name"]: (row["input"], row["grid"], row["mechanism"]) for row in csv.DictReader(file)}
    assert rows == {
        "crossvit_9_240": ("240x240", "14x14", "token:shift"),  # takes neither
        "fastvit_t8": ("256x256, checked at 112x112", "4x4", "pool"),
        "vit_tiny_patch16_384": ("384x384, checked at 112x112", "7x7", "token:attend"),  # built for it
    }
    assert "1 architectures of more than" in page.read_text()
