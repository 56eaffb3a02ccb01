"""KD, DKD and NKD give the values and gradients of the authors' code."""

from __future__ import annotations

import pytest
import torch

from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from tests.distill.losses.golden import assert_matches, cases, vectors


def _kd(student, teacher, labels, hyper):
    return kd_loss(student, teacher, hyper["temperature"])


def _dkd(student, teacher, labels, hyper):
    return dkd_loss(student, teacher, labels, hyper["alpha"], hyper["beta"], hyper["temperature"])


def _nkd(student, teacher, labels, hyper):
    return nkd_loss(student, teacher, labels, hyper["gamma"], hyper["temp"])


def _nkd_sddrepo(student, teacher, labels, hyper):
    return nkd_loss(student, teacher, labels, hyper["gamma"], hyper["temp"], mask_target=False)


FUNCTIONS = {"kd": _kd, "dkd": _dkd, "nkd": _nkd, "nkd_sddrepo": _nkd_sddrepo}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", cases("sdd", "plain_cases"), ids=lambda case: case["id"])
def test_logit_loss_matches_authors_code(case, name, dtype):
    data, entry = vectors("sdd", case), case["losses"][name]
    student = data["student"].to(dtype).requires_grad_()
    loss = FUNCTIONS[name](student, data["teacher"].to(dtype), data["target"], entry["hyper"]).mean()
    loss.backward()
    # The authors' DKD takes differences of probabilities: its own error is near 1e-15 of the loss's terms.
    expected = entry.get("reference_stable_loss", data[f"{name}.loss"].item())
    assert_matches(loss.detach(), torch.tensor(expected, dtype=torch.float64), dtype)
    if entry["grad_finite"]:
        assert_matches(student.grad, data[f"{name}.grad_student"], dtype)
