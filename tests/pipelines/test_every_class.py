"""`pairs.py explain` over every model class of timm."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from distill.losses import LOSSES
from distill.models.region_logits.layout import TimmModel
from pipelines import pairs
from pipelines.setup import models

TABLE = Path(__file__).parents[2] / "docs" / "compatibility.csv"
SIDES = (64, 112, 224, 0)
"""Sides of the images, in pixels, of which the first is taken at which a model can be explained; 0: its own."""
READING = ("kd", "sdd", "ofd", "at", "crd", "simkd")
"""A loss for each thing that is read of a model: all 23 of them would take twice the time."""


def smallest() -> dict[str, dict[str, str]]:
    """The row of the table for the architecture of each class of timm that has the fewest parameters."""
    with TABLE.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: -float(row["parameters_M"] or 1e9))
    return {row["class"]: row for row in rows if row["class"]}


def explained(name: str, side: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `pairs.py explain NAME NAME` for images of this side."""
    outline = pairs.create_outline
    narrow = {"mlp_ratio": 0.0625} if name.startswith("vgg") else {}  # its head has nine tenths of 133 million parameters

    def small(name: str, **kwargs: Any) -> TimmModel:
        model = outline(name, **kwargs, **narrow)
        if side:
            cfg = dict(model.pretrained_cfg)
            if cfg.get("fixed_input_size"):
                model = outline(name, **kwargs, img_size=(side, side))
            model.pretrained_cfg = {**cfg, "input_size": (3, side, side)}
        return model

    with monkeypatch.context() as patched:
        patched.setattr(pairs, "create_outline", small)
        patched.setattr(models, "LOSSES", {name: LOSSES[name] for name in READING})
        return pairs.main(["explain", name, name, "--num-classes", "10"])


@pytest.mark.parametrize("row", smallest().values(), ids=smallest().keys())
def test_a_model_of_every_class_is_explained_as_teacher_and_as_student_or_refused_by_name(
    row: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = row["name"]
    encoder = row["mechanism"] == "refused"  # one that never has a classifier; its own size takes minutes
    codes = (explained(name, side, monkeypatch) for side in SIDES[: 1 if encoder else None])
    code = next((code for code in codes if code == 0), 2)
    said = capsys.readouterr()
    if encoder:
        assert code == 2
        assert said.err.splitlines()[-1].startswith(f"error: {name}")
        return
    assert code == 0, said.err
    assert f"teacher: {name} (" in said.out
    assert f"student: {name} (" in said.out
