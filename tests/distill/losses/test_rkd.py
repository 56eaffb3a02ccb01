"""RKD compares figures: distances and angles, blind to where a figure stands, how it is turned and how large it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses import rkd
from distill.losses.rkd import RKD, rkd_angle_loss, rkd_distance_loss
from distill.protocols import Target
from tests.distill.losses.outputs import facts, made, model_output
from tests.distill.losses.relations import rotation, rows, value_and_slope

STUDENT, TEACHER = rows(6, 5), rows(6, 9, seed=1)
BOTH = pytest.mark.parametrize("loss", [rkd_distance_loss, rkd_angle_loss])


def plain_distance(student, teacher):
    """As the paper writes it, from the differences."""

    def relative(vectors):
        distances = (vectors[:, None] - vectors[None]).norm(dim=2)
        return distances / distances[distances > 0].mean()

    return F.smooth_l1_loss(relative(student), relative(teacher), reduction="none").mean(1)


def plain_angle(student, teacher):
    """As the paper writes it: B^2 D numbers, then B^3."""

    def cosines(vectors):
        directions = F.normalize(vectors[None] - vectors[:, None], dim=2)
        return directions @ directions.transpose(1, 2)

    return F.smooth_l1_loss(cosines(student), cosines(teacher), reduction="none").mean((1, 2))


@BOTH
def test_products_of_centred_rows_give_what_differences_give(loss):
    plain = plain_distance if loss is rkd_distance_loss else plain_angle
    for found, expected in zip(value_and_slope(loss, STUDENT, TEACHER), value_and_slope(plain, STUDENT, TEACHER), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@BOTH
def test_a_similar_figure_is_perfect(loss):
    assert loss(3 * TEACHER @ rotation(9) + 5, TEACHER).max() < 1e-26


@BOTH
def test_images_of_both_sides_in_another_order_give_the_same_losses_in_that_order(loss):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(loss(STUDENT[order], TEACHER[order]), loss(STUDENT, TEACHER)[order])


def test_losses_are_not_negative_and_angles_bounded():
    assert (rkd_distance_loss(STUDENT, TEACHER) > 0).all()
    angles = rkd_angle_loss(STUDENT, TEACHER)
    assert ((angles > 0) & (angles <= 1.5)).all()


@BOTH
@pytest.mark.parametrize("batch", [1, 2])
def test_one_or_two_images_make_no_figure(loss, batch):
    found, slope = value_and_slope(loss, STUDENT[:batch], TEACHER[:batch])
    assert found.abs().max() < 1e-30
    assert slope.abs().max() < 1e-14


@BOTH
def test_equal_rows_get_an_ordinary_gradient(loss):
    student = STUDENT.clone()
    student[3] = student[1]
    found, slope = value_and_slope(loss, student, TEACHER)
    assert found.isfinite().all()
    assert 0 < slope.abs().max() < 1


@BOTH
def test_a_collapsed_batch_gets_no_gradient(loss):
    found, slope = value_and_slope(loss, STUDENT[:1].expand(6, 5), TEACHER)
    assert (found > 0).all()
    assert slope.abs().max() == 0


@BOTH
def test_near_rows_far_from_the_origin_are_exact_in_float32(loss):
    """Rows that differ by 0.01 around 5: the released code's float32 distances are wrong by up to 31 percent."""
    student, teacher = ((5 + 0.01 * each).float() for each in (rows(8, 64), rows(8, 64, seed=1)))
    found = loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), loss(student.double(), teacher.double()), rtol=1e-6, atol=0)
    plain = plain_distance if loss is rkd_distance_loss else plain_angle
    torch.testing.assert_close(found.double(), plain(student.double(), teacher.double()), rtol=1e-5, atol=0)


def test_angles_of_some_images_at_a_time_are_those_of_all(monkeypatch):
    whole = value_and_slope(rkd_angle_loss, STUDENT, TEACHER)
    for limit in (1, 2 * 36, 5 * 36):
        monkeypatch.setitem(rkd.CHUNK_ANGLES, "cpu", limit)
        for found, expected in zip(value_and_slope(rkd_angle_loss, STUDENT, TEACHER), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)


def test_the_criterion_weighs_both_parts():
    criterion = made("rkd", distance_weight=2.0, angle_weight=3.0)
    student, teacher = (model_output(side, criterion.student_needs) for side in ("student", "teacher"))
    loss, found = criterion(student, teacher, Target(torch.zeros(4).long()))
    distance, angle = (each(student.embedding, teacher.embedding).mean() for each in (rkd_distance_loss, rkd_angle_loss))
    assert loss == 2 * distance + 3 * angle
    assert found == {"distance": distance, "angle": angle}


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="rkd reads what the last linear layer reads, and the student has no such layer"):
        RKD(facts(4), facts(4))
    with pytest.raises(ValueError, match=r"angle_weight -1.0 must be finite and not negative"):
        made("rkd", angle_weight=-1.0)
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        rkd_angle_loss(rows(4, 5, 2, 2), rows(4, 5, 2, 2))
