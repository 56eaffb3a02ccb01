"""The main job on ImageNet photographs at 224 px: prepared, two steps of ResNet-34 -> ResNet-18 with both papers' losses,
evaluated. Skipped where the photographs are not at hand; the same path runs on the embedded scans in test_run.py."""

import json
import tarfile
from pathlib import Path

import pytest

from shards.prepare import main as prepare
from tests.processes import finished
from tests.runs import metrics

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT / "../shared/data/imagenet_sample.tar"
RECIPE = ROOT / "pipelines" / "recipes" / "imagenet" / "resnet34_resnet18_sdd_dkd_msdcrd.yaml"


@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason="no photographs: ../shared/data/imagenet_sample.tar is not there")
def test_two_steps_of_the_papers_pair_on_photographs(tmp_path: Path):
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = [m for m in archive.getmembers() if m.isfile()][:40]
        archive.extractall(tmp_path, members, filter="data")
    shards, out = tmp_path / "shards", tmp_path / "run"
    assert prepare(["folder", "--source", str(tmp_path / "imagenet_sample"), "--out", str(shards), "--shards", "2"]) == 0
    request = [
        "--recipe",
        str(RECIPE),
        "--teacher-weights",
        "random",
        "--train",
        str(shards),
        "--val",
        str(shards),
        "--out",
        str(out),
    ]
    small = [
        "--train.global_batch_size",
        "8",
        "--train.max_steps",
        "2",
        "--report.log_every",
        "1",
        "--teacher.evaluate",
        "false",
        "--report.page",
        "false",
    ]
    finished([*request, *small, "--train.mixed_precision", "no", "--schedule.warmup_epochs", "1"], tmp_path / "log")
    steps = [line for line in metrics(out) if "loss/total" in line]
    assert [line["step"] for line in steps] == [1, 2]
    for line in steps:
        # the recipe's weights: cross-entropy 1, SD-DKD 1, MSDCRD 0.8; pytest.approx is false for NaN
        expected = line["loss/cross_entropy"] + line["loss/sdd"] + 0.8 * line["loss/msdcrd"]
        assert line["loss/total"] == pytest.approx(expected, rel=1e-5)
    assert metrics(out)[-1]["eval/images"] == 40
    assert json.loads((out / "summary.json").read_text())["bad_samples"] == 0
