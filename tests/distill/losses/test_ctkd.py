"""CTKD: the temperature has the gradient of the loss, in reverse, and stays in its bounds."""

from __future__ import annotations

import pytest
import torch

from distill.losses.ctkd import CTKD, curriculum, reverse_gradient
from distill.losses.logits import dkd_loss, kd_loss
from distill.protocols import ModelOutput, Progress, Target

LABELS = torch.tensor([0, 3, 5, 1])


def logits(seed: int = 0, size: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Student [4, 6] that takes a gradient, and teacher; float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = size * torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def rows(base: str, student, teacher, temperature, **options):
    """The loss of each row."""
    if base == "kd":
        return kd_loss(student, teacher, temperature, **options)
    return dkd_loss(student, teacher, LABELS, 1.0, 2.0, temperature, **options)


def outputs(student, teacher):
    """Model outputs of these logits."""
    return tuple(ModelOutput(each, each[:, :, None, None], {}, {}, {}) for each in (student, teacher))


def at_epoch(epoch: int) -> Target:
    """The target of a step in this epoch, from 0."""
    return Target(LABELS, progress=Progress(3 * epoch + 1, 3, 300))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("base", ["kd", "dkd"])
def test_the_gradient_to_a_tensor_temperature_is_the_slope_of_the_loss(base, standardise):
    student, teacher = logits()
    temperature = torch.tensor([2.5], dtype=torch.float64, requires_grad=True)
    function = lambda t: rows(base, student.detach(), teacher, t, standardise=standardise)  # noqa: E731
    assert torch.autograd.gradcheck(function, temperature)


@pytest.mark.parametrize("base", ["kd", "dkd"])
def test_a_tensor_temperature_gives_the_value_and_the_students_gradient_of_the_number(base):
    found = []
    for temperature in (15.5, torch.tensor(15.5, requires_grad=True), torch.tensor([15.5])):
        student, teacher = logits()
        loss = rows(base, student.float(), teacher.float(), temperature)
        loss.sum().backward()
        found.append((loss, student.grad))
    for loss, slope in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(slope, found[0][1])


def test_huge_logits_give_the_temperature_a_finite_gradient():
    """The released DKD gives it NaN in the first step under PyTorch 2: it differentiates 0 log 0 of the class left out."""
    for base in ("kd", "dkd"):
        student, teacher = logits(size=1e4)
        temperature = torch.tensor(2.0, requires_grad=True)
        rows(base, student, teacher, temperature).sum().backward()
        assert temperature.grad.isfinite()
        assert student.grad.isfinite().all()


def test_the_student_minimises_and_g_maximises_by_the_curriculums_share():
    student, teacher = logits()
    for epoch, share in ((0, 0.0244717418524), (4, 0.5), (9, 1.0), (150, 1.0)):
        criterion = CTKD().double()
        loss, found = criterion(*outputs(student, teacher), at_epoch(epoch))
        slope, ascent = torch.autograd.grad(loss, [student, criterion.g])
        temperature = found["temperature"].clone().requires_grad_()
        plain = kd_loss(student, teacher, temperature).mean()
        expected, rise = torch.autograd.grad(plain, [student, temperature])
        torch.testing.assert_close(slope, expected)
        torch.testing.assert_close(ascent, -share * rise * 20 * criterion.g.sigmoid() * (1 - criterion.g.sigmoid()))
        with torch.no_grad():
            criterion.g -= 0.1 * ascent  # what an optimiser that minimises does
        assert criterion(*outputs(student, teacher), at_epoch(epoch))[0] > loss


def test_the_temperature_begins_at_15_62_and_stays_in_its_bounds():
    criterion = CTKD()
    pair = outputs(*logits())
    assert abs(criterion(*pair, at_epoch(0))[1]["temperature"].item() - 15.6212) < 1e-4
    for g, bound in ((-1e4, 1.0), (1e4, 21.0)):
        torch.nn.init.constant_(criterion.g, g)
        assert criterion(*pair, at_epoch(20))[1]["temperature"] == bound


def test_the_curriculum_rises_from_0_to_1_and_the_linear_one_ends_an_epoch_short():
    assert [round(curriculum(epoch, 10), 4) for epoch in (0, 5, 10, 200)] == [0, 0.5, 1, 1]
    assert [curriculum(epoch, 10, "linear") for epoch in (0, 5, 10, 200)] == [0, 0.5, 0.9, 0.9]


def test_reverse_gradient_is_the_identity_with_a_gradient_even_where_the_share_is_0():
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    for share in (0.0, 0.25):
        y = reverse_gradient(x, share)
        assert torch.equal(y, x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(slope, torch.full((2,), -share))


def test_decay_of_g_is_the_optimisers_rule_unless_it_is_switched_off():
    assert CTKD().no_weight_decay == frozenset()
    assert CTKD(decay_temperature=False).no_weight_decay == {"g"}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"start": 0.0}, "start 0.0 must be positive"),
        ({"span": -1.0}, "span -1.0 must be finite and not negative"),
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"base": "nkd"}, "base 'nkd' is unknown; choose one of kd, dkd"),
        ({"shape": "step"}, "shape 'step' is unknown"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        CTKD(**options)


def test_a_temperature_of_several_numbers_is_refused():
    with pytest.raises(ValueError, match=r"temperature \[2\] must be one number"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))
