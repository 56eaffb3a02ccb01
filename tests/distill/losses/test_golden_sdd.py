"""SDD gives the values and gradients of the authors' code, through each pooling and each base loss."""

from __future__ import annotations

import pytest
import torch

from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.losses.sdd import complementary, sdd_loss
from distill.regions import pooling_matrix
from tests.distill.losses.golden import assert_matches, cases, stored, vectors

CASES = cases("sdd", "sdd_cases")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
EACH_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
LOSSES = ["sdd_kd", "sdd_dkd", "sdd_nkd", "derived_nkd_maskfix"]
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)
ROUNDING = 1e-15
"""Error of the authors' code in float64 where student and teacher agree and the loss is 0."""


def base_of(name: str, hyper: dict) -> tuple[str, dict]:
    """Our base loss and its options for a golden entry; the SDD repository's NKD keeps the target class."""
    if name in ("sdd_kd", "m1_kd"):
        return "kd", {"temperature": hyper["temperature"]}
    if name in ("sdd_dkd", "m1_dkd"):
        return "dkd", {key: hyper[key] for key in ("alpha", "beta", "temperature")}
    return "nkd", {"gamma": hyper["gamma"], "temperature": hyper["temp"], "mask_target": name == "derived_nkd_maskfix"}


def region_logits(logit_map: torch.Tensor, scales: list[int], mode: str) -> torch.Tensor:
    """[B, K, H, W] -> [B, R, K]; the classifier is linear, so pooling its map is pooling the features."""
    matrix = pooling_matrix(*logit_map.shape[-2:], scales, mode)
    return torch.einsum("rp,bkp->brk", matrix.to(logit_map.dtype), logit_map.flatten(2))


def expected_loss(case: dict, name: str, data: dict) -> torch.Tensor:
    """The authors' value; where their DKD overflowed and gave up, that of the same formula in log space."""
    return torch.tensor(case["losses"][name].get("reference_stable_loss", data[f"{name}.loss"].item()), dtype=torch.float64)


@DTYPES
@EACH_LOSS
@EACH_CASE
def test_sdd_matches_authors_code_on_their_regions(case, name, dtype):
    data, entry = vectors("sdd", case), case["losses"][name]
    base, options = base_of(name, entry["hyper"])
    student = data["student_patches"].transpose(1, 2).to(dtype).requires_grad_()
    teacher = data["teacher_patches"].transpose(1, 2).to(dtype)
    loss = sdd_loss(student, teacher, data["target"], base, base_options=options)
    loss.backward()
    assert_matches(loss.detach(), expected_loss(case, name, data), dtype, ROUNDING if dtype == torch.float64 else 1e-12)
    if not entry.get("official_fallback"):
        assert_matches(student.grad.transpose(1, 2), data[f"{name}.grad_patches"], dtype, ROUNDING)


def stored_maps() -> list:
    """(case, pooling, loss, prefix of its stored entries): `cascade` is what was released, `direct.*` their losses over each
    scale pooled from the full map, stored where that differs."""
    found = []
    for case in CASES:
        names = stored("sdd", case)
        agree = all(side % 4 == 0 for side in case["student_map_hw"] + case["teacher_map_hw"])
        for loss in LOSSES:
            found.append(pytest.param(case, "cascade", loss, loss, id=f"{case['id']}-cascade-{loss}"))
            prefix = f"direct.{loss}" if f"direct.{loss}.loss" in names else loss
            if prefix != loss or agree:
                found.append(pytest.param(case, "adaptive", loss, prefix, id=f"{case['id']}-adaptive-{loss}"))
    return found


@pytest.mark.parametrize(("case", "mode", "name", "prefix"), stored_maps())
def test_sdd_matches_authors_code_from_the_maps(case, mode, name, prefix):
    data, entry = vectors("sdd", case), case["losses"][name]
    base, options = base_of(name, entry["hyper"])
    student = data["student_map"].double().requires_grad_()
    regions = [region_logits(logit_map, case["scales"], mode) for logit_map in (student, data["teacher_map"].double())]
    loss = sdd_loss(*regions, data["target"], base, base_options=options)
    loss.backward()
    expected = data[f"{prefix}.loss"] if prefix != name else expected_loss(case, name, data)
    assert_matches(loss.detach(), expected, torch.float64, ROUNDING)
    if f"{prefix}.grad_map" in data and not entry.get("official_fallback"):
        assert_matches(student.grad, data[f"{prefix}.grad_map"], torch.float64, ROUNDING)


@EACH_CASE
def test_cascade_regions_are_the_authors(case):
    data = vectors("sdd", case)
    for side in ("student", "teacher"):
        regions = region_logits(data[f"{side}_map"].double(), case["scales"], "cascade")
        assert_matches(regions.transpose(1, 2), data[f"{side}_patches"], torch.float64)


@EACH_CASE
def test_global_region_is_the_mean_in_the_other_poolings(case):
    data = vectors("sdd", case)
    for mode in ("area", "adaptive"):
        regions = region_logits(data["student_map"].double(), case["scales"], mode)
        assert_matches(regions[:, 0], data["student_global"], torch.float64)


@EACH_CASE
def test_region_weights_are_the_codes_and_the_papers(case):
    data = vectors("sdd", case)
    teacher = data["teacher_patches"].transpose(1, 2)
    for rule, key in (("label", "cell_weights_official"), ("class", "cell_weights_paper")):
        assert torch.equal(1 + complementary(teacher, data["target"], rule).to(torch.int8), data[key])


@EACH_CASE
def test_each_region_has_the_authors_loss(case):
    data = vectors("sdd", case)
    student, teacher = (data[f"{side}_patches"].transpose(1, 2) for side in ("student", "teacher"))
    labels = data["target"][:, None].expand(student.shape[:2])
    functions = {"kd": lambda **options: kd_loss(student, teacher, **options)}
    functions["dkd"] = lambda **options: dkd_loss(student, teacher, labels, **options)
    functions["nkd"] = lambda **options: nkd_loss(student, teacher, labels, **options)
    for name in ("sdd_kd", "sdd_dkd", "sdd_nkd"):
        entry = case["losses"][name]
        base, options = base_of(name, entry["hyper"])
        if not entry["official_fallback"]:
            assert_matches(functions[base](**options), data[f"{name}.per_cell"], torch.float64, 1e-13)


@EACH_CASE
def test_papers_sum_and_weights_are_options(case):
    data = vectors("sdd", case)
    student, teacher = (data[f"{side}_patches"].transpose(1, 2) for side in ("student", "teacher"))
    for name in ("sdd_kd", "sdd_dkd", "sdd_nkd"):
        entry = case["losses"][name]
        if entry["official_fallback"]:
            continue
        base, options = base_of(name, entry["hyper"])
        for key, changes in (
            ("derived_loss_paper_weights_mean", {"rule": "class"}),
            ("derived_loss_paper_weights_sum_over_cells", {"rule": "class", "reduction": "sum"}),
            ("derived_loss_unweighted_mean", {"complementary_weight": 1.0}),
        ):
            loss = sdd_loss(student, teacher, data["target"], base, base_options=options, **changes)
            assert_matches(loss, torch.tensor(entry[key], dtype=torch.float64), torch.float64, 21 * ROUNDING)


@pytest.mark.parametrize("case", [case for case in CASES if case["scales"] == [1]], ids=lambda case: case["id"])
@pytest.mark.parametrize("name", ["m1_kd", "m1_dkd", "m1_nkd"])
def test_one_scale_is_the_base_loss_on_the_logits(case, name):
    data = vectors("sdd", case)
    base, options = base_of(name, case["losses"][name.replace("m1", "sdd")]["hyper"])
    student = data["student_global"].requires_grad_()
    loss = sdd_loss(student[:, None], data["teacher_global"][:, None], data["target"], base, base_options=options)
    loss.backward()
    assert_matches(loss.detach(), data[f"{name}.loss"], torch.float64)
    assert_matches(student.grad, data[f"{name}.grad_global"], torch.float64)
