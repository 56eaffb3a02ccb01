"""A model scores the same on the same images, however their preparation numbered the classes."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from distill.data.index import ShardIndex
from distill.models.build import create_model
from distill.models.export import export_student
from distill.models.input_spec import input_spec_of
from pipelines.evaluate import main
from shards.prepare import main as prepare
from tests.shards.preparing import image_bytes
from tests.shards.test_sources import add

CLASSES = 11


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """folder/ and wds/: the same images, of classes that are called 0 to 10, in plain order and in that of their numbers."""
    (tmp_path / "hub").mkdir()
    with tarfile.open(tmp_path / "hub/val-0.tar", "w") as tar:
        for label in range(CLASSES):
            (tmp_path / f"images/{label}").mkdir(parents=True)
            for number in range(2):
                data = image_bytes(10 * label + number, (32, 32), "PNG")
                (tmp_path / f"images/{label}/{number}.png").write_bytes(data)
                add(tar, f"{label}_{number}.cls", str(label).encode())
                add(tar, f"{label}_{number}.png", data)
    for kind, source in (("folder", "images"), ("wds", "hub")):
        assert prepare([kind, "--source", str(tmp_path / source), "--out", str(tmp_path / kind)]) == 0
    return tmp_path


def test_evaluation_matches_classes_by_their_names_or_refuses(
    prepared: Path, capsys: pytest.CaptureFixture[str], fresh_accelerate: None
):
    """A student of timm's order scored 16.67 instead of 91.67 on the same images prepared as a folder, without a word."""
    torch.manual_seed(0)
    model = create_model("cifar_resnet8", num_classes=CLASSES)
    model.get_classifier().weight.data *= 20  # a fresh one says much the same of every class
    names = ShardIndex.open(prepared / "wds").class_names
    assert names == tuple(str(number) for number in range(CLASSES)) != ShardIndex.open(prepared / "folder").class_names
    export_student(model, prepared / "student", input_spec=input_spec_of(model), class_names=list(names))
    asked = ["--model", "cifar_resnet8", "--weights", str(prepared / "student"), "--json", str(prepared / "figures.json")]
    losses = []
    for kind in ("wds", "folder"):
        assert main([*asked, "--val", str(prepared / kind)]) == 0
        losses.append(json.loads((prepared / "figures.json").read_text())["loss"])
        assert ("matched by their names" in capsys.readouterr().out) == (kind == "folder")
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert main([*asked, "--val", str(prepared / "folder"), "--class-map", "by_number"]) == 0
    assert json.loads((prepared / "figures.json").read_text())["loss"] != pytest.approx(losses[0], abs=1e-3)
    config = json.loads((prepared / "student/config.json").read_text())
    config["label_names"][0] = "zero"
    (prepared / "student/config.json").write_text(json.dumps(config))
    assert main([*asked, "--val", str(prepared / "wds")]) == 2
    assert "class 0 is 'zero' there, '0' in the data" in capsys.readouterr().err.splitlines()[-1]
