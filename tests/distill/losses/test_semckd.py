"""SemCKD weighs every pair of stages by an attention that is made of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.semckd import SemCKD, gram_rows, semckd_attention, semckd_loss
from distill.protocols import DataFacts, ModelFacts, ModelOutput, Target
from tests.distill.losses.outputs import FACTS, facts

BATCH = 16
DATA = DataFacts(BATCH, torch.zeros(BATCH, dtype=torch.int64), BATCH)
TARGET = Target(torch.zeros(BATCH, dtype=torch.int64))


def output(model: ModelFacts, seed: int = 0, batch: int = BATCH) -> ModelOutput:
    """A model output of random stages, float64, on small grids; all take a gradient."""
    generator = torch.Generator().manual_seed(seed)
    stages = {
        i - len(model.stages): torch.randn(batch, s.channels, 9 - 2 * i, 8 - i, generator=generator).double().requires_grad_()
        for i, s in enumerate(model.stages)
    }
    return ModelOutput(stages[-1][:, :, 0, 0], stages[-1], {}, {}, stages)


def made(student: ModelFacts, teacher: ModelFacts, **options) -> SemCKD:
    """The criterion in float64."""
    torch.manual_seed(0)
    return SemCKD(student, teacher, DATA, **options).double()


def test_attention_is_a_share_of_each_of_the_teachers_stages():
    queries, keys = (F.normalize(torch.randn(5, n, 4), dim=-1) for n in (2, 3))
    attention = semckd_attention(queries, keys)
    assert attention.shape == (5, 2, 3)
    torch.testing.assert_close(attention.sum(2), torch.ones(5, 2))
    order = [2, 0, 1]
    torch.testing.assert_close(semckd_attention(queries, keys[:, order]), attention[:, :, order])
    sharper = semckd_attention(queries, keys, softness=0.1)
    assert (sharper.amax(2) > attention.amax(2)).all()


def test_one_pair_is_plain_regression_without_a_gradient_to_queries_and_keys():
    criterion = made(facts(4), facts(5))
    student, teacher = output(facts(4)), output(facts(5), seed=1)
    loss, found = criterion(student, teacher, TARGET)
    predicted = criterion.pairs.regressors["0-0"](student.feature_map)
    torch.testing.assert_close(loss, F.mse_loss(predicted, teacher.feature_map))
    assert found["attention-1"] == 1
    loss.backward()
    assert all(p.grad.abs().max() < 1e-15 for p in (*criterion.pairs.queries.parameters(), *criterion.pairs.keys.parameters()))


def test_every_stage_and_parameter_gets_a_gradient_and_the_teacher_none():
    criterion = made(**FACTS)
    student, teacher = output(FACTS["student"]), output(FACTS["teacher"], seed=1)
    loss, found = criterion(student, teacher, TARGET)
    loss.backward()
    assert list(found) == ["attention-4", "attention-3", "attention-2", "attention-1"]
    torch.testing.assert_close(sum(found.values()), torch.ones(()).double())
    assert all(p.grad.abs().max() > 0 for p in criterion.parameters())
    assert all(each.grad.abs().max() > 0 for each in student.stages.values())
    assert all(each.grad is None for each in teacher.stages.values())


def test_the_students_maps_learn_through_the_grams_too():
    criterion = made(facts(4, 4), facts(5, 5))
    student, teacher = output(facts(4, 4)), output(facts(5, 5), seed=1)
    attention, _ = criterion.pairs(list(student.stages.values()), [t.detach() for t in teacher.stages.values()], 1.0)
    (slope,) = torch.autograd.grad(attention[:, :, 0].sum(), student.feature_map)
    assert slope.abs().max() > 0


def test_the_loss_is_the_mean_over_the_students_stages_of_the_weighted_sum_over_the_teachers():
    attention, distances = torch.rand(2, 4, 3, 5).softmax(-1).unbind(0)
    expected = sum((attention[:, i] * distances[:, i]).sum(1) for i in range(3)) / 3
    torch.testing.assert_close(semckd_loss(attention, distances), expected)


def test_grams_of_half_precision_maps_do_not_overflow():
    rows = gram_rows(torch.randn(4, 64, 64, 64).relu().half())
    assert rows.dtype == torch.float32
    assert rows.max() > 65504
    assert rows.isfinite().all()


def test_an_embedding_of_zeros_is_finite():
    criterion = made(facts(4, 4), facts(5, 5))
    for embed in criterion.pairs.queries:
        torch.nn.init.zeros_(embed[2].weight)
        torch.nn.init.zeros_(embed[2].bias)
    student = output(facts(4, 4))
    loss, _ = criterion(student, output(facts(5, 5), seed=1), TARGET)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in criterion.parameters())


def test_it_has_the_released_number_of_parameters():
    data = DATA._replace(micro_batch=64)
    criterion = SemCKD(facts(64, 128, 256), facts(64, 128, 256), data)
    assert sum(p.numel() for p in criterion.parameters()) == 10233632


@pytest.mark.parametrize("batch", [4, 7])
def test_a_micro_batch_whose_embeddings_have_one_number_is_refused(batch):
    with pytest.raises(ValueError, match=f"a micro-batch of {batch} leaves 1, .* cannot learn; take 8 or more"):
        SemCKD(**FACTS, data=DATA._replace(micro_batch=batch))


def test_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match="made for micro-batches of 16 images and got 8"):
        made(facts(4), facts(5))(output(facts(4), batch=8), output(facts(5), batch=8), TARGET)


def test_options_that_cannot_be_right_are_refused():
    with pytest.raises(ValueError, match=r"0\.0 must be positive"):
        SemCKD(**FACTS, data=DATA, softness=0.0)
    with pytest.raises(ValueError, match="one of them has none"):
        SemCKD(facts(4), facts(5), DATA, source="blocks")
