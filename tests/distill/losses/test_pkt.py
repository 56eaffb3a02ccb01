"""PKT compares distributions over the batch that know directions only."""

from __future__ import annotations

import pytest
import torch

from distill.losses.pkt import PKT, _likeness, pkt_loss
from distill.protocols import Needs, Target
from tests.distill.losses.outputs import FACTS, facts, made, model_output
from tests.distill.losses.relations import rotation, rows, value_and_slope

STUDENT, TEACHER = rows(6, 5), rows(6, 9, seed=1)


def test_a_rotated_copy_of_the_teacher_is_perfect():
    assert pkt_loss(TEACHER @ rotation(9), TEACHER).abs().max() < 1e-16
    assert pkt_loss(TEACHER, TEACHER).abs().max() == 0


def test_likeness_is_a_distribution_over_the_batch_with_the_image_itself():
    likeness = _likeness(STUDENT, 1e-7)
    torch.testing.assert_close(likeness.sum(1), torch.ones(6, dtype=torch.float64))
    assert (likeness.diagonal() >= likeness.amax(1)).all()


def test_images_of_both_sides_in_another_order_give_the_same_losses_in_that_order():
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(pkt_loss(STUDENT[order], TEACHER[order]), pkt_loss(STUDENT, TEACHER)[order])


def test_the_loss_is_the_divergence_of_the_batch_divided_by_it():
    mine, theirs = _likeness(STUDENT, 0.0), _likeness(TEACHER, 0.0)
    divergence = (theirs * (theirs.log() - mine.log())).sum(1)
    torch.testing.assert_close(pkt_loss(STUDENT, TEACHER), divergence / 6, rtol=1e-5, atol=0)


def test_one_image_has_no_relations():
    loss, slope = value_and_slope(pkt_loss, STUDENT[:1], TEACHER[:1])
    assert loss.item() == 0
    assert slope.abs().max() < 1e-20


@pytest.mark.parametrize("length", [0.0, 1e-7])
def test_a_row_without_a_direction_gets_no_gradient_and_the_others_an_ordinary_one(length):
    student = STUDENT.clone()
    student[2] *= length / student[2].norm()
    loss, slope = value_and_slope(pkt_loss, student, TEACHER)
    assert loss.isfinite().all()
    assert slope[2].abs().max() == 0
    assert 0 < slope.abs().max() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_near_the_teacher_only_the_rounding_of_the_inputs_counts(dtype):
    student, teacher = (TEACHER + 1e-3 * rows(6, 9, seed=3)).to(dtype), TEACHER.to(dtype)
    found = pkt_loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), pkt_loss(student.double(), teacher.double()), rtol=1e-6, atol=0)


def test_the_criterion_compares_embeddings():
    criterion = made("pkt")
    student, teacher = (model_output(side, criterion.student_needs) for side in ("student", "teacher"))
    loss = criterion(student, teacher, Target(torch.zeros(4).long()))[0]
    assert loss == pkt_loss(student.embedding, teacher.embedding).mean()


def test_a_model_without_an_embedding_is_refused_by_name():
    with pytest.raises(ValueError, match="pkt reads what the last linear layer reads, and the teacher has no such layer"):
        PKT(FACTS["student"], facts(4))
    with pytest.raises(ValueError, match=r"ask for it with Needs\(embedding=True\)"):
        made("pkt")(model_output("student", Needs()), model_output("teacher", Needs()), Target(torch.zeros(4).long()))
    with pytest.raises(ValueError, match="must have 2 dimensions"):
        pkt_loss(rows(4, 5, 2, 2), rows(4, 5, 2, 2))
