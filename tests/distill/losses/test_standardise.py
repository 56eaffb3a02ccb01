"""Logit standardisation (LSKD): what must hold of it in every loss that has the option."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from distill.losses.logits import dkd_loss, kd_loss, nkd_loss, standardise
from distill.losses.sdd import SDD, sdd_loss
from distill.protocols import ModelOutput, Target

LABELS = torch.tensor([0, 3, 5, 1])
LOSSES = {
    "kd": lambda s, t, **options: kd_loss(s, t, 2.0, **options),
    "dkd": lambda s, t, **options: dkd_loss(s, t, LABELS, temperature=2.0, **options),
    "nkd": lambda s, t, **options: nkd_loss(s, t, LABELS, **options),
}
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)


def logits(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher, float64; the student takes a gradient."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


@EACH_LOSS
def test_the_option_is_the_loss_of_standardised_logits_in_value_and_gradient(name):
    student, teacher = logits(4, 6)
    loss = LOSSES[name](student, teacher, standardise=True)
    expected = LOSSES[name](standardise(student), standardise(teacher))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    slopes = [torch.autograd.grad((each * weights).sum(), student)[0] for each in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-13)


@EACH_LOSS
def test_positive_scale_and_shift_of_either_side_change_nothing_but_eps(name):
    student, teacher = logits(4, 6)
    expected = LOSSES[name](student, teacher, standardise=True)
    for changed in ((5 * student - 2, teacher), (student, 0.1 * teacher + 30)):
        torch.testing.assert_close(LOSSES[name](*changed, standardise=True), expected, rtol=1e-5, atol=1e-6)


@EACH_LOSS
def test_the_gradient_neither_shifts_nor_scales_a_row(name):
    student, teacher = logits(4, 6)
    (slope,) = torch.autograd.grad(LOSSES[name](student, teacher, standardise=True).sum(), student)
    assert slope.abs().max() > 0.01
    assert slope.sum(-1).abs().max() < 1e-14
    assert (slope * student).sum(-1).abs().max() < 1e-6


@EACH_LOSS
def test_rows_of_equal_logits_are_finite_with_a_gradient_of_1_over_eps_at_most(name):
    student, teacher = torch.full((4, 6), 2.5, requires_grad=True), torch.zeros(4, 6)
    teacher[0, 1] = 1
    loss = LOSSES[name](student, teacher, standardise=True)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e9


def test_two_classes_leave_no_signal():
    student, teacher = logits(4, 2)
    loss = kd_loss(student, teacher, 2.0, standardise=True)
    loss.sum().backward()
    assert standardise(student).abs().sub(0.5**0.5).abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="standardise divides by the deviation over classes and got 1 class"):
        kd_loss(torch.zeros(2, 1), torch.zeros(2, 1), standardise=True)


@pytest.mark.parametrize("base", ["kd", "dkd", "nkd"])
def test_each_region_of_sdd_is_standardised_on_its_own(base):
    student, teacher = logits(4, 5, 6)
    found = sdd_loss(student, teacher, LABELS, base, base_options={"standardise": True})
    expected = sdd_loss(standardise(student), standardise(teacher), LABELS, base)
    torch.testing.assert_close(found, expected)
    shifted = student + torch.arange(5.0)[:, None], teacher * torch.arange(1.0, 6.0)[:, None]
    torch.testing.assert_close(
        sdd_loss(*shifted, LABELS, base, base_options={"standardise": True}), found, atol=1e-6, rtol=1e-6
    )


def test_sdds_option_is_its_bases():
    plain, scaled = SDD(), SDD(standardise=True)
    student, teacher = (each.detach() for each in logits(4, 5, 6))
    outputs = [ModelOutput(each[:, 0], each, {plain.regions: each}, {}, {}) for each in (student, teacher)]
    expected = partial(sdd_loss, student, teacher, LABELS)
    assert plain(*outputs, Target(LABELS))[0] == expected()
    assert scaled(*outputs, Target(LABELS))[0] == expected(base_options={"standardise": True})
