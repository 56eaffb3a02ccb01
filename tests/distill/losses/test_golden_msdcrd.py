"""The contrastive loss gives the values and gradients of the paper's equations."""

from __future__ import annotations

import pytest
import torch

from distill.losses.msdcrd import contrastive_loss
from tests.distill.losses.golden import assert_matches, cases, vectors

CASES = cases("msdcrd", "cases")
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
KINDS = {
    "log": ("", {"form": "log"}),
    "eq12": ("", {"form": "eq12"}),
    "log, no mask": ("nomask_", {"form": "log", "mask_same_category": False}),
    "eq12, no mask": ("nomask_", {"form": "eq12", "mask_same_category": False}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", KINDS)
@EACH_CASE
def test_contrastive_loss_matches_the_equations(case, kind, dtype):
    prefix, options = KINDS[kind]
    suffix = "log" if options["form"] == "log" else "nolog"
    data = vectors("msdcrd", case)
    student = data["student"].to(dtype).flatten(0, 1).requires_grad_()
    loss = contrastive_loss(
        student,
        data["teacher"].to(dtype).flatten(0, 1),
        data["category"].flatten(),
        data["tau"].item(),
        chunk_rows=7,
        **options,
    )
    loss.backward()
    assert_matches(loss.detach(), data[f"{prefix}loss_{suffix}"], dtype)
    if f"{prefix}grad_{suffix}" in data:
        assert_matches(student.grad.view_as(data["student"]), data[f"{prefix}grad_{suffix}"], dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case["loss_log"] == 0], ids=lambda case: case["name"])
def test_one_category_is_exactly_zero(case):
    data = vectors("msdcrd", case)
    for form, expected in (("log", 0.0), ("eq12", -1.0)):
        student = data["student"].flatten(0, 1).requires_grad_()
        loss = contrastive_loss(student, data["teacher"].flatten(0, 1), data["category"].flatten(), form=form)
        loss.backward()
        assert loss.item() == expected
        assert student.grad.abs().max() == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_without_gathering_a_rank_contrasts_its_own_rows(ranks):
    case = next(case for case in CASES if case["name"].startswith("sharded"))
    data = vectors("msdcrd", case)
    expected_losses, expected_gradients = (
        data[f"ranks{ranks}_local_loss_log"],
        data[f"ranks{ranks}_local_grad_log"].chunk(ranks),
    )
    shards = zip(*(data[key].chunk(ranks) for key in ("student", "teacher", "category")), strict=True)
    for rank, (student, teacher, category) in enumerate(shards):
        student = student.double().flatten(0, 1).requires_grad_()
        loss = contrastive_loss(student, teacher.double().flatten(0, 1), category.flatten())
        loss.backward()
        assert_matches(loss.detach(), expected_losses[rank], torch.float64)
        assert_matches(student.grad.view_as(expected_gradients[rank]), expected_gradients[rank], torch.float64)
