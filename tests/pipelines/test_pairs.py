"""`pipelines/pairs.py`: the real command."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from distill.config import RecipeError
from distill.losses import LOSSES
from distill.models.describe import count_parameters, create_outline, describe, probed_with_noise
from distill.models.input_spec import input_spec_of
from distill.protocols import DataFacts, Needs
from pipelines.measure import compatibility as pairs_matrix
from pipelines.pairs import main
from pipelines.setup.models import build_models
from tests.runs import recipe_of

ROOT = Path(__file__).parents[2]
READ_LOGITS = {"kd", "dkd", "nkd", "sdd", "msdcrd", "dist", "wkd_logit", "cat_kd", "ctkd", "mlkd", "simkd", "srrl"}
"""Losses that read the logits of a teacher or of its regions, or take its classifier."""


def pairs(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "pipelines" / "pairs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def without_weights(reason: str) -> str:
    """The reason without the number that is of random weights."""
    return re.sub(r"off by [\d.e+-]+", "off by X", reason)


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


@pytest.mark.parametrize("teacher_classes", [10, 0])
def test_explain_refuses_what_a_run_refuses_in_the_same_words(
    teacher_classes: int, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher whose head is more than pooling and one linear layer, and the same without its classifier."""
    name, student = "convnext_atto", "cifar_resnet8"
    assert main(["explain", name, student, "--num-classes", "10", "--teacher-classes", str(teacher_classes), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    more = ["--teacher", name, *(("--teacher.model_kwargs", "{num_classes: 0}") if teacher_classes == 0 else ())]
    recipe = recipe_of(digits, tmp_path, *more)
    data = DataFacts(10, torch.arange(10), 64)
    said = {}
    for loss in LOSSES:
        try:
            build_models(dataclasses.replace(recipe, loss={loss: {"weight": 1.0}}), 10, data, torch.device("cpu"))
        except RecipeError as error:
            said[loss] = without_weights(str(error))
    told = {loss: how for loss, how in report["losses"].items() if how.startswith("refused: ")}
    assert {loss: f"loss.{loss}: {without_weights(how.removeprefix('refused: '))}" for loss, how in told.items()} == said
    if teacher_classes:
        assert "its logits are no affine function of the map's mean" in said["cat_kd"]
        assert "simkd needs a teacher of global average pooling and one linear layer" in said["simkd"]
    else:
        assert said.keys() == {*READ_LOGITS, "fitnet", "fsp"}, "these two: sizes and channels of maps that do not fit"
        assert all("has no classifier" in said[loss] for loss in ("kd", "dkd", "nkd", "sdd", "ctkd"))
        assert "set categories to labels, or mask_same_category to false" in said["msdcrd"]
        assert "convnext_atto is taken without a classifier: losses that read its logits are refused" in report["warnings"]
    served = {loss: how for loss, how in report["losses"].items() if loss not in told}
    assert all(re.fullmatch("(teacher: [a-z].*; )?student: [a-z].*", how) for how in served.values()), served


def test_explain_takes_a_teacher_whose_published_weights_have_no_classifier_without_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["explain", "eva02_tiny_patch14_224", "cifar_resnet8", "--num-classes", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  rkd: teacher: embedding; student: embedding" in lines
    [line] = [line for line in lines if line.startswith("  kd: ")]
    assert line.startswith(
        "  kd: refused: eva02_tiny_patch14_224 has no classifier (num_classes 0) and cannot give logits; take"
    )


def test_a_class_token_that_a_batch_of_one_image_takes_as_it_is_can_be_counted() -> None:
    model = create_outline("cait_xxs24_224", num_classes=10, img_size=64, depth=2)
    with probed_with_noise(
        model, name="cait", input_spec=dataclasses.replace(input_spec_of(model), height=64, width=64)
    ) as probed:
        assert describe(probed, Needs()).flops > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


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
