"""Training by the real command on two ranks through a split with every kind of fault: nothing is lost, also over a resume."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from tests.distill.data.conftest import REAL_IMAGES, picture
from tests.distill.data.faulty_epoch import BATCH, check, plant, reported, request
from tests.distill.data.planting import encoded
from tests.processes import finished
from tests.runs import last_state, metrics

COUNT = 4 * BATCH


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures made here as CLASS/NAME.jpg."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(80):
        path = root / ("apple", "bear")[number % 2] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(60 + number % 9, 70 - number % 5, seed=number), quality=85))
    return root


def test_an_epoch_over_real_photographs_loses_no_step_and_reports_exactly_the_planted_faults(tmp_path):
    archive = REAL_IMAGES / "imagenet_sample.tar"
    if not archive.is_file():
        pytest.skip("no real images: ../shared/data/imagenet_sample.tar is not there")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, [member for member in tar.getmembers() if member.isfile()][:150], filter="data")
    bad = plant(tmp_path / "imagenet_sample", tmp_path, COUNT, 0.005)
    assert len(set(bad.values())) == 14
    finished(request(tmp_path, tmp_path / "run"), tmp_path / "log", world_size=2)
    check(tmp_path / "run", bad, COUNT)


def test_bad_samples_of_all_ranks_travel_in_the_checkpoint_and_the_stream_stays_the_same(pictures, tmp_path):
    bad = plant(pictures, tmp_path, COUNT, 0.005)
    whole, parts, blocks = tmp_path / "whole", tmp_path / "parts", ("--data.shuffle_block", "16")
    # saves by the clock, which is another one on every rank, and saving is a collective
    finished(request(tmp_path, whole, *blocks, "--train.checkpoint_minutes", "0.005"), tmp_path / "log", world_size=2)
    check(whole, bad, COUNT)
    finished(request(tmp_path, parts, *blocks, "--train.max_steps", "3"), tmp_path / "log", world_size=2)
    known = saved(parts)["train"]["bad_samples"]
    assert known == sorted({line["sample"] for line in reported(parts)})
    assert (saved(parts)["step"], saved(parts)["train"]["shuffle_block"]) == (3, 16)
    before = len(reported(parts))
    finished(request(tmp_path, parts, *blocks, "--resume"), tmp_path / "log", world_size=2)
    assert {line["key"] for line in reported(parts)} == set(bad)
    assert not {line["sample"] for line in reported(parts)[before:]} & set(known)
    assert metrics(parts)[-2]["bad_samples"] == len(bad)
    one, other = last_state(whole), last_state(parts)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def saved(out: Path) -> dict:
    """The state of the data in the newest checkpoint."""
    folder = out / "checkpoints" / (out / "checkpoints" / "LAST").read_text()
    return json.loads((folder / "checkpoint.json").read_text())["meta"]["data"]
