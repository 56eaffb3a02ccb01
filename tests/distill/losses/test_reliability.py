"""SDD's regions weighted by how sure the teacher is of them, and the control that shows what a smaller loss alone does."""

from __future__ import annotations

import pytest
import torch

from distill.losses.sdd import SDD, region_losses, region_reliability, sdd_loss
from distill.protocols import Target
from tests.distill.losses.outputs import made, model_output
from tests.distill.losses.relations import rows

STUDENT, TEACHER, LABELS = 3 * rows(4, 5, 6), 3 * rows(4, 5, 6, seed=1), torch.tensor([0, 3, 5, 1])


def test_reliability_runs_from_the_floor_of_no_opinion_to_1_of_certainty():
    sure = torch.tensor([[[1e4, 0.0, 0.0]]])
    assert region_reliability(sure, floor=0.3).item() == pytest.approx(1)
    assert region_reliability(torch.zeros(1, 1, 3), floor=0.3).item() == pytest.approx(0.3)
    found = region_reliability(TEACHER, floor=0.3)
    assert ((found > 0.3) & (found < 1)).all()
    assert (region_reliability(TEACHER, floor=0.3, power=2.0) < found).all()


def test_each_region_is_weighted_by_it_at_the_bases_temperature():
    losses, outside = region_losses(STUDENT, TEACHER, LABELS, "nkd", "label", {"temperature": 2.0})
    weights = torch.where(outside, 3.0, 1.0) * region_reliability(TEACHER, 2.0, 0.1, 0.5)
    found = sdd_loss(
        STUDENT,
        TEACHER,
        LABELS,
        "nkd",
        3.0,
        base_options={"temperature": 2.0},
        reliability="confidence",
        reliability_floor=0.1,
        reliability_power=0.5,
    )
    torch.testing.assert_close(found, (losses * weights).mean())
    by_default = sdd_loss(STUDENT, TEACHER, LABELS, "nkd", reliability="confidence")
    losses, outside = region_losses(STUDENT, TEACHER, LABELS, "nkd", "label", None)
    weights = torch.where(outside, 2.0, 1.0) * region_reliability(TEACHER, 1.0)
    torch.testing.assert_close(by_default, (losses * weights).mean())


def test_the_control_makes_the_plain_loss_smaller_by_the_mean_weight():
    factor = region_reliability(TEACHER).mean()
    expected = sdd_loss(STUDENT, TEACHER, LABELS) * factor
    torch.testing.assert_close(sdd_loss(STUDENT, TEACHER, LABELS, reliability="mean"), expected)


def test_a_floor_of_1_is_the_plain_loss():
    plain = sdd_loss(STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(sdd_loss(STUDENT, TEACHER, LABELS, reliability="confidence", reliability_floor=1.0), plain)


@pytest.mark.parametrize("reliability", ["confidence", "mean"])
def test_the_criterion_reports_the_mean_weight_and_adds_up(reliability):
    criterion = made(
        "sdd", base="dkd", scales=(1, 2, 4), reliability=reliability, reliability_power=0.5, complementary_weight=3.0
    )
    student, teacher = (model_output(side, criterion.student_needs) for side in ("student", "teacher"))
    loss, found = criterion(student, teacher, Target(LABELS))
    regions = criterion.regions
    weights = region_reliability(teacher.region_logits[regions], 4.0, 0.2, 0.5)
    torch.testing.assert_close(found["reliability"], weights.mean())
    torch.testing.assert_close(found["consistent_loss"] + 3 * found["complementary_loss"], loss.detach())


def test_the_teacher_gets_no_gradient():
    teacher = TEACHER.clone().requires_grad_()
    sdd_loss(STUDENT.clone().requires_grad_(), teacher, LABELS, reliability="confidence").backward()
    assert teacher.grad is None


def test_impossible_weights_are_refused():
    with pytest.raises(ValueError, match="reliability 'entropy' is unknown; choose one of none, confidence, mean"):
        SDD(reliability="entropy")
    with pytest.raises(ValueError, match=r"reliability_floor 1\.5 must lie in 0\.\.1"):
        SDD(reliability_floor=1.5)
    with pytest.raises(ValueError, match="reliability_power 0 must be positive"):
        SDD(reliability_power=0)
    with pytest.raises(ValueError, match="got 1 class; it needs at least 2"):
        region_reliability(torch.zeros(2, 3, 1))
