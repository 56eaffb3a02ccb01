"""MGD generates the teacher's map from a masked student's; masks are drawn anew and come again after a resume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.mgd import MGD, cell_mask, channel_mask, mgd_loss
from distill.protocols import ModelOutput, Target
from tests.distill.losses.outputs import facts


def output(feature_map: torch.Tensor) -> ModelOutput:
    """A model output whose last map this is."""
    return ModelOutput(feature_map.mean((2, 3)), feature_map, {}, {}, {-1: feature_map})


def pair(grid=(7, 7), teacher_grid=(7, 7), channels=(4, 5), batch=3, dtype=torch.float64):
    """Student, which takes a gradient, and teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(batch, width, *size, generator=generator).to(dtype)
        for width, size in zip(channels, (grid, teacher_grid), strict=True)
    )
    return student.requires_grad_(), teacher


def target(seed: int = 0) -> Target:
    """What a step of this seed knows."""
    return Target(torch.zeros(3, dtype=torch.int64), generator=torch.Generator().manual_seed(seed))


def test_nothing_is_masked_at_0():
    criterion = MGD(facts(4), facts(5), mask_ratio=0.0).double()
    student, teacher = pair()
    loss, found = criterion(output(student), output(teacher), target())
    torch.testing.assert_close(loss, mgd_loss(criterion.generator(criterion.align(student)), teacher).mean())
    assert found["masked_share"] == 0


@pytest.mark.parametrize("mask", ["channel", "cell"])
def test_at_1_the_student_learns_nothing_and_the_generator_its_biases(mask):
    torch.manual_seed(0)  # biases that leave some ReLU open
    criterion = MGD(facts(4), facts(5), mask=mask, mask_ratio=1.0).double()
    student, teacher = pair()
    loss, found = criterion(output(student), output(teacher), target())
    loss.backward()
    assert found["masked_share"] == 1
    assert student.grad.abs().max() == 0
    assert all(layer.bias.grad.abs().max() > 0 for layer in (criterion.generator[0], criterion.generator[2]))


@pytest.mark.parametrize(("mask", "shape"), [("channel", (3, 5, 1, 1)), ("cell", (3, 1, 7, 7))])
def test_a_step_draws_the_same_mask_again_and_the_next_another(mask, shape):
    criterion = MGD(facts(4), facts(5), mask=mask, mask_ratio=0.5).double()
    student, teacher = pair()
    losses = [criterion(output(student), output(teacher), target(seed))[0] for seed in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]
    assert criterion._uniform(torch.zeros(3, 5, 7, 7), None).shape == shape


def test_borders_are_kept_as_released():
    uniform = torch.tensor([0.0, 0.25, 0.75, 1.0])
    assert channel_mask(uniform, 0.25).tolist() == [False, True, True, True]
    assert cell_mask(uniform, 0.25).tolist() == [True, True, True, False]


def test_the_loss_is_the_mean_over_images():
    criterion = MGD(facts(4), facts(5), mask_ratio=0.0).double()
    student, teacher = pair(batch=4)
    whole = criterion(output(student), output(teacher), target())[0]
    halves = [criterion(output(s), output(t), target())[0] for s, t in zip(student.split(2), teacher.split(2), strict=True)]
    torch.testing.assert_close(whole, sum(halves) / 2)


@pytest.mark.parametrize(
    ("grid", "teacher_grid", "common"), [((8, 8), (4, 4), (4, 4)), ((2, 2), (8, 8), (2, 2)), ((5, 3), (4, 6), (4, 3))]
)
def test_the_larger_grid_is_averaged_to_the_smaller(grid, teacher_grid, common):
    criterion = MGD(facts(4), facts(5), mask_ratio=0.0).double()
    student, teacher = pair(grid, teacher_grid)
    loss, _ = criterion(output(student), output(teacher), target())
    mine, theirs = (F.adaptive_avg_pool2d(each, common) for each in (student, teacher))
    torch.testing.assert_close(loss, mgd_loss(criterion.generator(criterion.align(mine)), theirs).mean())
    loss.backward()
    assert student.grad.abs().min() > 0


def test_a_sum_of_squares_that_half_precision_cannot_hold_is_finite():
    student, teacher = torch.full((1, 256, 28, 28), 30.0).half(), torch.zeros(1, 256, 28, 28).half()
    assert mgd_loss(student, teacher).isfinite().all()


@pytest.mark.parametrize(("student", "teacher", "count"), [(512, 512, 4719616), (256, 256, 1180160), (960, 256, 1426176)])
def test_it_has_the_released_number_of_parameters(student, teacher, count):
    assert sum(p.numel() for p in MGD(facts(student), facts(teacher)).parameters()) == count


def test_options_that_cannot_be_right_are_refused():
    with pytest.raises(ValueError, match=r"mask_ratio 1.5 must lie in 0\.\.1"):
        MGD(facts(4), facts(4), mask_ratio=1.5)
    with pytest.raises(ValueError, match="mask 'spatial' is unknown; choose one of channel, cell"):
        MGD(facts(4), facts(4), mask="spatial")
