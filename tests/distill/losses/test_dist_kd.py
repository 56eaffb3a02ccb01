"""DIST compares predictions by their correlations, over classes and over images."""

from __future__ import annotations

import pytest
import torch

from distill.losses.dist_kd import Dist, dist_loss
from distill.protocols import ModelFacts, Needs, Target
from tests.distill.losses.outputs import FACTS, made, model_output
from tests.distill.losses.relations import rows

STUDENT, TEACHER = rows(6, 5), rows(6, 5, seed=1)


def test_the_total_is_the_weighted_sum_times_the_squared_temperature():
    total, inter, intra = dist_loss(STUDENT, TEACHER, 2.0, 0.5, 4.0)
    torch.testing.assert_close(total, 16 * (2 * inter + 0.5 * intra))


def test_correlations_are_those_of_corrcoef():
    mine, theirs = STUDENT.softmax(1), TEACHER.softmax(1)
    _, inter, intra = dist_loss(STUDENT, TEACHER)
    for found, a, b in ((inter, mine, theirs), (intra, mine.T, theirs.T)):
        expected = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]).mean()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_constant_added_to_an_images_logits_changes_nothing():
    torch.testing.assert_close(dist_loss(STUDENT + rows(6, 1, seed=3), TEACHER), dist_loss(STUDENT, TEACHER))


def test_images_and_classes_may_change_places():
    images, classes = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([4, 2, 0, 1, 3])
    moved = [each[images][:, classes] for each in (STUDENT, TEACHER)]
    torch.testing.assert_close(dist_loss(*moved), dist_loss(STUDENT, TEACHER))


def test_over_classes_alone_each_image_counts_for_itself():
    alone = torch.stack([dist_loss(STUDENT[i : i + 1], TEACHER[i : i + 1], gamma=0.0)[0] for i in range(6)]).mean()
    torch.testing.assert_close(dist_loss(STUDENT, TEACHER, gamma=0.0)[0], alone)


def test_one_image_has_no_correlation_over_images_and_no_gradient_of_it():
    student = STUDENT[:1].clone().requires_grad_()
    total, _, intra = dist_loss(student, TEACHER[:1], beta=0.0, temperature=2.0)
    assert intra == 1
    assert total == 4
    total.backward()
    assert student.grad.abs().max() == 0


def test_many_tiny_columns_are_exact_in_bfloat16_outputs():
    student, teacher = ((20 * each).bfloat16() for each in (rows(8, 1000), rows(8, 1000, seed=1)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dist_loss(student, teacher)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dist_loss(student.double(), teacher.double())[0], rtol=1e-6, atol=0)


def test_the_criterion_compares_logits_and_reports_both_parts():
    student, teacher = (model_output(side, Needs()) for side in ("student", "teacher"))
    loss, found = made("dist", beta=2.0)(student, teacher, Target(torch.zeros(4).long()))
    expected = dist_loss(student.logits, teacher.logits, beta=2.0)
    assert (loss, found["inter"], found["intra"]) == expected


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"student \[6, 5\] and teacher \[6, 4\] differ"):
        dist_loss(STUDENT, TEACHER[:, :4])
    with pytest.raises(ValueError, match="dist compares classes and got a student of 6 and a teacher of 0"):
        Dist(FACTS["student"], ModelFacts(0, ()))
    with pytest.raises(ValueError, match=r"temperature 0.0 must be positive"):
        made("dist", temperature=0.0)
    with pytest.raises(ValueError, match=r"gamma -1.0 must be finite and not negative"):
        made("dist", gamma=-1.0)
