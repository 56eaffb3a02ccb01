"""AT compares where maps are large, whatever their channels are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.at import AT, at_loss
from distill.losses.maps import to_grid
from distill.protocols import Needs, Target
from tests.distill.losses.outputs import FACTS, facts, made, model_output
from tests.distill.losses.refusals import refused_in_one_line
from tests.distill.losses.relations import rotation, rows, value_and_slope

STUDENT, TEACHER = rows(4, 5, 6, 6), rows(4, 7, 6, 6, seed=1)
LABELS = torch.tensor([0, 3, 5, 1])


def test_equal_maps_of_any_scale_are_perfect():
    assert at_loss(TEACHER, TEACHER).max() == 0
    torch.testing.assert_close(at_loss(1e3 * STUDENT, TEACHER), at_loss(STUDENT, TEACHER), rtol=1e-12, atol=0)


def test_channels_may_be_mixed_by_a_rotation_at_power_2():
    turned = torch.einsum("bchw,cd->bdhw", STUDENT, rotation(5))
    torch.testing.assert_close(at_loss(turned, TEACHER), at_loss(STUDENT, TEACHER), rtol=1e-12, atol=0)


def test_cells_of_both_maps_may_change_places():
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    moved = [each.flatten(2)[..., order].view_as(each) for each in (STUDENT, TEACHER)]
    torch.testing.assert_close(at_loss(*moved), at_loss(STUDENT, TEACHER), rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [2, 4])
def test_losses_are_bounded_at_even_powers(power):
    losses = at_loss(STUDENT, TEACHER, power) * 36
    assert ((losses >= 0) & (losses <= 2)).all()


def test_each_image_has_its_own_loss():
    torch.testing.assert_close(at_loss(STUDENT[1:2], TEACHER[1:2]), at_loss(STUDENT, TEACHER)[1:2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("power", [1, 2])
def test_a_map_without_attention_gets_no_gradient(power):
    student = STUDENT.clone()
    student[2] = 0
    if power == 1:
        student[2, 0], student[2, 1] = 1.0, -1.0  # channels that cancel in every cell
    loss, slope = value_and_slope(at_loss, student, TEACHER, power)
    assert loss.isfinite().all()
    assert slope[2].abs().max() == 0
    assert 0 < slope.abs().max() < 1


@pytest.mark.parametrize("grid", [(3, 3), (4, 5), (1, 6), (6, 6)])
def test_pooling_to_a_grid_is_pytorchs_adaptive_pooling(grid):
    torch.testing.assert_close(to_grid(STUDENT, *grid), F.adaptive_avg_pool2d(STUDENT, grid), rtol=1e-12, atol=1e-14)
    assert to_grid(STUDENT.half(), *grid).dtype == torch.float32


def test_the_larger_map_is_pooled_side_by_side():
    """An oblong student and an oblong teacher meet at the smaller height and the smaller width."""
    student, teacher = rows(4, 5, 8, 3), rows(4, 7, 4, 6, seed=1)
    expected = at_loss(F.adaptive_avg_pool2d(student, (4, 3)), F.adaptive_avg_pool2d(teacher, (4, 3)))
    torch.testing.assert_close(at_loss(student, teacher), expected, rtol=1e-12, atol=0)


def test_pairs_are_taken_from_the_end_or_as_told():
    student, teacher = (model_output(side, Needs(stages=(-1, -2, -3, -4)[: 3 + (side == "teacher")])) for side in FACTS)

    def total(*pairs):
        return sum(at_loss(student.stages[mine], teacher.stages[theirs]).mean() for mine, theirs in pairs)

    expected = {"all": [(-1, -1), (-2, -2), (-3, -3)], "last": [(-1, -1)], ((0, 0), (1, 1)): [(-3, -4), (-2, -3)]}
    for pairs, stages in expected.items():
        loss, found = made("at", pairs=pairs)(student, teacher, Target(LABELS))
        torch.testing.assert_close(loss, total(*stages))
        torch.testing.assert_close(sum(found.values()), loss.detach())
        assert list(found) == [f"pair{number}/loss" for number in range(len(stages))]
    assert made("at").teacher_needs == Needs(stages=(-1, -2, -3))
    assert made("at", source="blocks", pairs=((0, -1),)).teacher_needs == Needs(blocks=(4,))


REFUSED = {
    "power": (lambda: AT(**FACTS, power=0), "power 0 must be at least 1"),
    "stage": (lambda: AT(**FACTS, pairs=((-4, -4),)), "stage -4 does not exist: the model has 3 stages"),
    "block": (lambda: AT(**FACTS, source="blocks", pairs=((0, 5),)), "block 5 does not exist: the model has 5 blocks"),
    "name": (lambda: AT(**FACTS, pairs="first"), "pairs 'first' must be 'all', 'last' or"),
    "none": (lambda: AT(**FACTS, pairs=()), "pairs .* must be 'all', 'last' or"),
    "no stages": (lambda: AT(facts(4), facts()), "compares stages of both models, and one of them has none"),
    "vectors": (lambda: at_loss(rows(4, 5), rows(4, 5)), "must have 4 dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_requests_are_refused_in_one_line(case):
    refused_in_one_line(*REFUSED[case])
