"""The parts of WCoRD as we reconstruct them: a critic over CRD's memory and an optimal transport within the batch."""

from __future__ import annotations

import pytest
import torch

from distill.losses.wcord import WCoRD, sinkhorn_plan, spectral_norm, wcord_global_loss, wcord_local_loss
from distill.protocols import Target
from tests.distill.losses.outputs import DATA, FACTS, facts, made, model_output
from tests.distill.losses.relations import rows, value_and_slope

IDS = torch.tensor([3, 17, 0, 39])


def test_a_permuted_batch_costs_next_to_nothing_to_transport():
    teacher = rows(6, 5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert wcord_local_loss(teacher[order], teacher, entropy=0.01, iterations=200) < 1e-3
    assert wcord_local_loss(rows(6, 5, seed=1), teacher, entropy=0.01, iterations=200) > 0.1


def test_the_plan_has_uniform_marginals_at_the_default_entropy():
    cost = 1 - torch.nn.functional.normalize(rows(8, 5), dim=1) @ torch.nn.functional.normalize(rows(8, 5, seed=1), dim=1).T
    plan = sinkhorn_plan(cost, 0.1, 20)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=0.1, atol=0)
    assert sinkhorn_plan(1e3 * cost, 0.01, 20).isfinite().all()  # exp(-1e5) is 0 in any precision


def test_a_row_of_length_0_gets_no_gradient():
    student = rows(6, 5)
    student[2] = 0
    loss, slope = value_and_slope(wcord_local_loss, student, rows(6, 5, seed=1))
    assert loss.isfinite()
    assert slope[2].abs().max() == 0
    assert 0 < slope.abs().max() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (1, 4)])
def test_the_spectral_norm_is_the_largest_singular_value_with_its_gradient(shape, dtype):
    mine, plain = (rows(*shape).to(dtype).requires_grad_() for _ in range(2))
    found, expected = spectral_norm(mine), torch.linalg.matrix_norm(plain, 2)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mine.grad, plain.grad)


def test_the_critic_wants_the_positive_high_and_the_negatives_low():
    scores = rows(3, 6).exp().requires_grad_()
    losses = wcord_global_loss(scores, 2.0, 40)
    losses.sum().backward()
    assert (scores.grad[:, 0] < 0).all()
    assert (scores.grad[:, 1:] > 0).all()
    assert ((losses >= -1) & (losses <= 5)).all()


def test_the_criterion_weighs_both_parts_and_moves_the_banks():
    criterion = made("wcord", embedding=5, negatives=7, global_weight=2.0, local_weight=3.0)
    student, teacher = (model_output(side, criterion.student_needs) for side in ("student", "teacher"))
    before = criterion.memory.bank_student.clone()
    loss, found = criterion(student, teacher, Target(DATA.sample_labels[IDS], IDS))
    torch.testing.assert_close(loss.detach(), 2 * found["global"] + 3 * found["local"])
    loss.backward()
    assert student.feature_map.grad.abs().max() > 0
    assert teacher.feature_map.grad is None
    assert (criterion.memory.bank_student != before).any(1).nonzero().flatten().tolist() == sorted(IDS.tolist())


def test_impossible_requests_are_refused():
    with pytest.raises(ValueError, match="wcord reads what the last linear layer reads, and the student has no such layer"):
        WCoRD(facts(4), facts(4), DATA)
    with pytest.raises(ValueError, match=r"entropy 0\.0 must be positive"):
        WCoRD(**FACTS, data=DATA, entropy=0.0)
    with pytest.raises(ValueError, match=r"local_weight -1 must be finite"):
        WCoRD(**FACTS, data=DATA, local_weight=-1)
