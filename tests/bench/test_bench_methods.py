"""The cost of each method beside a real step: every loss is measured, and what is counted is what the loss really has."""

from __future__ import annotations

import pytest
import torch

from distill.losses import LOSSES
from tests.bench.methods import METHODS, Pair, build, kept_bytes, main, measure

TINY = Pair("cifar_resnet14", "cifar_resnet8", 32, 10, 8, 100)


def test_every_method_is_measured_with_its_parameters_and_its_state():
    found = measure(TINY, METHODS, rounds=1)
    assert set(found) == set(LOSSES) - {"cross_entropy"}
    assert all(each["share"] > 0 for each in found.values())
    parameters = {name: each["parameters"] for name, each in found.items()}
    assert (parameters["pkt"], parameters["ctkd"], parameters["crd"]) == (0, 1, 128 * (64 + 64) + 256)
    assert parameters["fitnet"] == 32 * 32 + 3 * 32
    # two banks of 100 samples and two normalisers
    assert found["crd"]["state"] == found["wcord"]["state"] == 2 * 100 * 128 * 4 + 2 * 4
    assert found["at"]["state"] == 0


def test_what_the_outputs_hold_anyway_is_not_counted_as_kept():
    _, methods = build(TINY, ["simkd", "kd"])
    last = methods["simkd"].student.feature_map
    # behind the projector: outputs of three convolutions and their BatchNorms and ReLUs, of 32 or 64 channels on that grid
    least = 3 * 32 * last[:, :1].numel() * 4
    assert least < kept_bytes(methods["simkd"]) < 20 * least
    assert kept_bytes(methods["kd"]) < 16 * methods["kd"].student.logits.nbytes
    methods["kd"].loss().backward()
    assert methods["kd"].student.logits.grad.isfinite().all()
    assert all(each.grad is None for each in methods["kd"].teacher if isinstance(each, torch.Tensor))


def test_an_unknown_loss_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["--loss", "crdd"]) == 2
    assert "crdd" in capsys.readouterr().err
