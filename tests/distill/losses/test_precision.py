"""Values and gradients are finite wherever the inputs are sensible, and exact to the precision they are given in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.losses.msdcrd import contrastive_loss
from distill.losses.sdd import sdd_loss
from tests.distill.losses.references import contrast as plain_contrast
from tests.distill.losses.references import dkd as plain_dkd
from tests.distill.losses.references import kd as plain_kd
from tests.distill.losses.references import nkd as plain_nkd

FEW = settings(max_examples=25, deadline=None, derandomize=True)
LOSSES = {
    "kd": (lambda s, t, y, T: kd_loss(s, t, T), lambda s, t, y, T: plain_kd(s, t, T)),
    "dkd": (lambda s, t, y, T: dkd_loss(s, t, y, 1.0, 8.0, T), lambda s, t, y, T: plain_dkd(s, t, y, 1.0, 8.0, T)),
    "nkd": (lambda s, t, y, T: nkd_loss(s, t, y, 1.5, T), lambda s, t, y, T: plain_nkd(s, t, y, 1.5, T)),
    "nkd, target kept": (
        lambda s, t, y, T: nkd_loss(s, t, y, 1.5, T, False),
        lambda s, t, y, T: plain_nkd(s, t, y, 1.5, T, False),
    ),
}
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)


def slope(loss, student, *rest):
    """The loss of rows and the gradient of their mean."""
    student = student.detach().clone().requires_grad_()
    rows = loss(student, *rest)
    return rows.detach(), torch.autograd.grad(rows.mean(), student)[0]


@EACH_LOSS
@FEW
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]),
    classes=st.sampled_from([2, 5, 100]),
    temperature=st.sampled_from([1.0, 4.0]),
)
def test_float32_is_exact_from_tiny_to_huge_differences(name, seed, spread, classes, temperature):
    """To 1e-5 of the value itself, also where the textbook sum in float32 keeps no digit: at a spread of 0.001 KD is 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 8, classes, generator=generator) * spread
    labels = torch.randint(classes, (8,), generator=generator)
    ours, plain = LOSSES[name]
    rows, gradient = slope(ours, student, teacher, labels, temperature)
    expected, exact = slope(plain, student.double(), teacher.double(), labels, temperature)
    # the reference itself is exact to 1e-13 of its terms
    assert ((rows - expected).abs() <= 1e-5 * expected + 1e-12).all()
    assert (gradient - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-12


@EACH_LOSS
@pytest.mark.parametrize("gap", [90, 104, 1e4])
def test_a_wide_gap_is_finite_where_the_published_dkd_is_not(name, gap):
    """With teacher (2, 1, 0) and T = 1 the released DKD's gradient is not finite from a student gap of 90, its loss from 104"""
    teacher = torch.tensor([[2.0, 1.0, 0.0]]).repeat(6, 1)
    student = torch.tensor([[g * gap, -g * gap, 0.0] for g in (1, -1, 0.5, -0.5)] + [[gap, gap, 0.0], [0.0, 0.0, gap]])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    ours, plain = LOSSES[name]
    rows, gradient = slope(ours, student, teacher, labels, 1.0)
    expected, exact = slope(plain, student.double(), teacher.double(), labels, 1.0)
    assert rows.isfinite().all()
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-7)


@EACH_LOSS
@FEW
@given(seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_logits_of_ten_thousand_are_finite(name, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = ((torch.rand(2, 6, 7, generator=generator) - 0.5) * 2e4).to(dtype)
    labels = torch.randint(7, (6,), generator=generator)
    rows, gradient = slope(LOSSES[name][0], student, teacher, labels, 1.0)
    assert rows.dtype == torch.float32
    assert gradient.dtype == dtype
    assert rows.isfinite().all()
    assert gradient.isfinite().all()


@EACH_LOSS
def test_bfloat16_logits_under_autocast_lose_only_their_own_rounding(name):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 32, 1000, generator=generator) * 3).bfloat16()
    labels = torch.randint(1000, (32,), generator=generator)
    ours, plain = LOSSES[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows, gradient = slope(ours, student, teacher, labels, 4.0)
    expected, exact = slope(plain, student.double(), teacher.double(), labels, 4.0)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-6, atol=0)
    assert (gradient.double() - exact).norm() <= 3e-3 * exact.norm()  # it is handed back in bfloat16


def test_sdd_on_imagenet_like_logits_in_each_precision():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 21, 1000, generator=generator) * 2.5
    student = teacher + torch.randn(4, 21, 1000, generator=generator)
    labels = torch.randint(1000, (4,), generator=generator)
    for base in ("kd", "dkd", "nkd"):
        exact = sdd_loss(student.double(), teacher.double(), labels, base)
        torch.testing.assert_close(sdd_loss(student, teacher, labels, base).double(), exact, rtol=1e-6, atol=0)
        coarse = sdd_loss(student.bfloat16(), teacher.bfloat16(), labels, base)
        assert coarse.dtype == torch.float32
        torch.testing.assert_close(coarse.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("form", ["log", "eq12"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrast_computes_in_float32_under_autocast(dtype, form):
    """Under autocast a product of float32 matrices runs in bfloat16; here it must not."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 672, 64, generator=generator).to(dtype)
    categories = torch.randint(20, (672,), generator=generator)

    def ours(s):
        return contrastive_loss(s, teacher, categories, form=form)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = slope(ours, student)
    expected, exact = slope(lambda s: plain_contrast(s, teacher.double(), categories, form=form), student.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    rounding = 1e-5 if dtype == torch.float32 else 3e-3
    assert (gradient.double() - exact).norm() <= rounding * exact.norm()


@pytest.mark.parametrize("agreement", [0.0, 1.0])
def test_a_sharp_temperature_does_not_overflow(agreement):
    """Nor does it lose what little is left of the loss where student and teacher agree: 1e-5 at a temperature of 0.03."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 40, 8, generator=generator)
    student = torch.lerp(student, teacher, agreement)
    categories = torch.arange(40)
    for temperature in (0.1, 0.03, 0.01, 1e-3):
        value, gradient = slope(lambda s, t=temperature: contrastive_loss(s, teacher, categories, t), student)
        expected, exact = slope(lambda s, t=temperature: plain_contrast(s, teacher.double(), categories, t), student.double())
        # cosines are exact to 1e-7 in float32, exponents to 1e-7 / temperature
        torch.testing.assert_close(value.double(), expected, rtol=1e-5 + 1e-6 / temperature, atol=1e-30)
        assert (gradient.double() - exact).norm() <= (1e-5 + 2e-6 / temperature) * exact.norm() + 1e-30
