"""SP sees which images are alike, and nothing else of the maps."""

from __future__ import annotations

import pytest
import torch

from distill.losses.sp import SP, sdsp_loss, sp_loss
from distill.protocols import Needs, Regions, Target
from distill.regions import pool, region_matrix
from tests.distill.losses.outputs import FACTS, facts, made, model_output
from tests.distill.losses.refusals import refused_in_one_line
from tests.distill.losses.relations import rotation, rows, value_and_slope

STUDENT, TEACHER = rows(6, 5, 3, 3).relu(), rows(6, 4, 2, 2, seed=1).relu()
LABELS = torch.tensor([0, 3, 5, 1])


def test_a_scaled_or_rotated_copy_of_the_teacher_is_perfect():
    turned = (3 * TEACHER.flatten(1)) @ rotation(16)
    assert sp_loss(TEACHER, TEACHER).max() == 0
    assert sp_loss(turned, TEACHER).max() < 1e-28


def test_images_of_both_sides_in_another_order_give_the_same_losses_in_that_order():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(sp_loss(STUDENT[order], TEACHER[order]), sp_loss(STUDENT, TEACHER)[order], rtol=1e-12, atol=0)


def test_losses_are_bounded_by_the_batch():
    assert (sp_loss(rows(6, 3, seed=4), rows(6, 3, seed=5)) <= 4 / 6).all()
    assert (sp_loss(STUDENT, TEACHER) <= 2 / 6).all()


def test_equal_images_are_alike_to_all_alike():
    alike = STUDENT[:1].expand_as(STUDENT)
    one_hot = torch.eye(6, dtype=torch.float64)
    expected = ((6**-0.5 - 1) ** 2 + 5 * 6**-1) / 6  # each entry 1 / sqrt(B) against the identity
    torch.testing.assert_close(sp_loss(alike, one_hot), torch.full((6,), expected, dtype=torch.float64))


def test_one_image_has_no_relations():
    loss, slope = value_and_slope(sp_loss, STUDENT[:1], TEACHER[:1])
    assert loss.item() == 0
    assert slope.abs().max() == 0


@pytest.mark.parametrize("length", [0.0, 1e-7])
def test_an_empty_map_gets_no_gradient_and_the_others_an_ordinary_one(length):
    student = STUDENT.clone()
    student[2] *= length / student[2].norm()
    loss, slope = value_and_slope(sp_loss, student, TEACHER)
    assert loss.isfinite().all()
    assert slope[2].abs().max() == 0
    assert 0 < slope.abs().max() < 1


def test_maps_in_any_memory_format_and_precision_are_taken():
    for student in (STUDENT.to(memory_format=torch.channels_last), STUDENT.float()):
        torch.testing.assert_close(sp_loss(student, TEACHER).double(), sp_loss(STUDENT, TEACHER), rtol=1e-5, atol=0)
    large = (1000 * STUDENT).half()
    assert sp_loss(large, TEACHER.half()).dtype == torch.float32
    torch.testing.assert_close(sp_loss(large, TEACHER).double(), sp_loss(STUDENT, TEACHER), rtol=1e-2, atol=0)


def test_three_readings_of_sp_over_regions_are_what_they_say():
    student, teacher = rows(4, 5, 3), rows(4, 5, 7, seed=1)
    each = torch.stack([sp_loss(student[:, region], teacher[:, region]) for region in range(5)], dim=1)
    torch.testing.assert_close(sdsp_loss(student, teacher), each)
    torch.testing.assert_close(sdsp_loss(student, teacher, "vector"), sp_loss(student.flatten(1), teacher.flatten(1)))
    joined = sp_loss(student.flatten(0, 1), teacher.flatten(0, 1))
    torch.testing.assert_close(sdsp_loss(student, teacher, "rows"), joined.view(4, 5))
    one = sdsp_loss(student[:, :1], teacher[:, :1])
    torch.testing.assert_close(one, sdsp_loss(student[:, :1], teacher[:, :1], "rows"))


@pytest.mark.parametrize("reading", ["mean", "vector", "rows"])
def test_a_cell_that_is_0_in_all_channels_gets_no_gradient(reading):
    student = rows(4, 5, 3)
    student[1, 2] = 0
    loss, slope = value_and_slope(sdsp_loss, student, rows(4, 5, 7, seed=1), reading=reading)
    assert loss.isfinite().all()
    assert slope.abs().max() < 1
    assert (slope[1, 2].abs().max() == 0) == (reading != "vector")  # of a long vector it is only a part


def test_the_criterion_reads_the_last_map_or_its_regions_or_the_networks_own_last_block():
    student, teacher = (model_output(side, Needs()) for side in ("student", "teacher"))
    assert made("sp").student_needs == made("sp").teacher_needs == Needs(stages=(-1,))
    loss = made("sp")(student, teacher, Target(LABELS))[0]
    assert loss == sp_loss(student.feature_map, teacher.feature_map).mean()
    regions = Regions((1, 2), "cascade")
    criterion = made("sp", scales=(1, 2), pooling="cascade", reading="rows")
    assert criterion.student_needs == criterion.teacher_needs == Needs(region_features=(regions,))
    mine, theirs = (model_output(side, criterion.student_needs) for side in ("student", "teacher"))
    pooled = (pool(each.feature_map, region_matrix(7, 7, regions)) for each in (mine, theirs))
    assert criterion(mine, theirs, Target(LABELS))[0] == sdsp_loss(*pooled, reading="rows").mean()
    blocks = made("sp", source="blocks")
    assert (blocks.student_needs, blocks.teacher_needs) == (Needs(blocks=(3,)), Needs(blocks=(4,)))


def test_the_teachers_regions_get_no_gradient():
    teacher = rows(4, 5, 7, seed=1).requires_grad_()
    student = rows(4, 5, 3).requires_grad_()
    sdsp_loss(student, teacher).mean().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


REFUSED = {
    "images": (lambda: sp_loss(STUDENT[:3], TEACHER), "3 rows of the student and 6 of the teacher"),
    "numbers": (lambda: sp_loss(STUDENT[:, 0, 0, 0], TEACHER), r"the student is \[6\]; it must have 2 or 3 or 4 dimensions"),
    "integers": (lambda: sp_loss(STUDENT, TEACHER.long()), "the teacher is torch.int64"),
    "regions": (lambda: sdsp_loss(rows(4, 5, 3), rows(4, 6, 3)), "5 and 6 regions"),
    "reading": (lambda: SP(**FACTS, scales=(1,), reading="sum"), "reading 'sum' is unknown; choose one of mean, vector, rows"),
    "scales": (lambda: SP(**FACTS, scales=(0,)), r"scales \[0\] must be positive"),
    "regions of blocks": (lambda: SP(**FACTS, scales=(1,), source="blocks"), "leave source at 'stages'"),
    "source": (lambda: SP(**FACTS, source="layers"), "source 'layers' is unknown; choose one of stages, blocks"),
    "no blocks": (lambda: SP(facts(3), facts(3), source="blocks"), "compares blocks of both models, and one of them has none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_requests_are_refused_in_one_line(case):
    refused_in_one_line(*REFUSED[case])
