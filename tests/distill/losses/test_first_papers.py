"""VID, CC, NST, SRRL, AB, FT and FSP: what the authors' numbers (tests/golden/methods/c) do not say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.losses.ab import AB, ab_loss
from distill.losses.cc import CC, cc_loss
from distill.losses.fsp import FSP, fsp_matrix
from distill.losses.ft import FT, ft_loss
from distill.losses.nst import nst_loss
from distill.losses.srrl import SRRL, srrl_loss
from distill.losses.vid import VID, vid_loss
from distill.protocols import DataFacts, MapShape, ModelFacts, Needs, Progress, Target
from tests.distill.losses.outputs import DATA, FACTS, facts, made, model_output
from tests.distill.losses.refusals import refused_in_one_line
from tests.distill.losses.relations import rotation, rows, value_and_slope

LABELS = torch.tensor([0, 3, 5, 1])


def test_vid_is_a_gaussian_likelihood_without_its_constant():
    predicted, teacher, variance = rows(3, 5, 4, 4), rows(3, 5, 4, 4, seed=1), rows(5).square() + 0.1
    gaussian = torch.distributions.Normal(predicted, variance.sqrt()[:, None, None])
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(vid_loss(predicted, teacher, variance), -(gaussian.log_prob(teacher) + constant).mean((1, 2, 3)))


def test_vid_starts_at_the_asked_variance_and_least_at_the_residuals_own():
    criterion = VID(**FACTS, initial_variance=2.5)
    loss, found = criterion(model_output("student", criterion.student_needs), model_output("teacher", criterion.teacher_needs),
                            Target(LABELS))  # fmt: skip
    assert found["pair0/variance"].item() == pytest.approx(2.5)
    torch.autograd.backward(loss)
    assert all(spread.grad is not None and spread.grad.abs().sum() > 0 for spread in criterion.spreads)
    residual = rows(64, 1, 8, 8)
    at = lambda scale: vid_loss(torch.zeros_like(residual), residual, (residual.square().mean() * scale)[None]).mean()  # noqa: E731
    assert at(1.0) < min(at(0.9), at(1.1))


def test_cc_multiplies_the_distances_of_neighbours():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 0.0]]), torch.zeros(3, 2)
    assert cc_loss(student, teacher).tolist() == [0.0, 0.0]
    assert cc_loss(student[[0, 2, 1]], teacher).tolist() == [3.0, 0.0]
    assert cc_loss(rows(4, 3), rows(4, 3)).max() == 0


def test_nst_does_not_see_the_order_the_size_or_the_sign_of_channels():
    teacher = rows(3, 5, 4, 4)
    same = (teacher * rows(5, seed=1)[:, None, None])[:, [3, 0, 4, 1, 2]]
    torch.testing.assert_close(nst_loss(same, teacher), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    other = rows(3, 8, 4, 4, seed=2)
    assert (nst_loss(other, teacher) > 0.01).all()
    torch.testing.assert_close(nst_loss(other[:, :5], teacher), nst_loss(teacher, other[:, :5]))


def test_nst_of_a_dead_channel_has_an_ordinary_gradient():
    student = rows(2, 4, 3, 3)
    student[:, 1] = 0
    losses, slope = value_and_slope(nst_loss, student, rows(2, 5, 3, 3, seed=1))
    assert losses.isfinite().all()
    assert 0 < slope.abs().max() < 100
    assert slope[:, 1].abs().max() == 0


def test_srrl_of_the_teachers_own_embedding_is_nothing_and_a_rotation_of_the_classes_changes_nothing():
    teacher, predicted, weight = rows(4, 6).relu(), rows(4, 6, seed=1).relu(), rows(5, 6, seed=2)
    assert sum(each.max() for each in srrl_loss(teacher, teacher, weight)) == 0
    torch.testing.assert_close(srrl_loss(predicted, teacher, weight), srrl_loss(predicted, teacher, rotation(5) @ weight))


def test_srrl_keeps_no_copy_of_the_teachers_classifier_in_its_state():
    teacher = ModelFacts(6, (), embedding=12, classifier=torch.randn(6, 12))
    criterion = SRRL(FACTS["student"], teacher)
    assert not any("classifier" in name for name in criterion.state_dict())
    criterion.project[0].weight.data.zero_()
    nn.init.zeros_(criterion.project[1].weight)
    assert criterion.project(torch.randn(4, 8)).abs().max() == 0


def test_ab_counts_only_how_far_neurons_are_from_the_teachers_side():
    teacher = torch.tensor([2.0, 0.1, -0.1, -5.0]).view(1, 4, 1, 1)
    assert ab_loss(torch.tensor([1.0, 7.0, -1.0, -9.0]).view(1, 4, 1, 1), teacher).item() == 0
    assert ab_loss(torch.tensor([0.0, 1.0, -1.0, 2.0]).view(1, 4, 1, 1), teacher).item() == 1 + 9
    assert ab_loss(torch.full((1, 4, 1, 1), 300.0).half(), -teacher.abs().half()).item() == 4 * 301.0**2


def test_ab_needs_no_connector_between_equal_shapes_and_serves_any_grids_by_pooling():
    assert not list(AB(FACTS["student"], FACTS["student"]).parameters())
    odd = ModelFacts(6, (MapShape(8, 5, 9),))
    refused_in_one_line(lambda: AB(odd, facts(8)), "no convolution brings .* set match: pool")
    assert list(AB(odd, facts(8), match="pool").parameters())
    assert made("ab", stages=(-1,)).student_needs == Needs(preactivations=(-1,))


def test_fsp_is_the_mean_of_outer_products():
    lower, upper = rows(2, 3, 4, 4), rows(2, 5, 4, 4, seed=1)
    torch.testing.assert_close(fsp_matrix(lower, upper), torch.einsum("bchw,bdhw->bdc", lower, upper) / 16)
    pooled = torch.nn.functional.adaptive_avg_pool2d(lower, 2)
    small = rows(2, 5, 2, 2, seed=2)
    torch.testing.assert_close(fsp_matrix(lower, small), fsp_matrix(pooled, small))


def test_fsp_refuses_stages_of_other_channels_and_models_of_one_stage():
    refused_in_one_line(lambda: FSP(**FACTS), "stages of equal channels; the student's have .* nets of one family")
    refused_in_one_line(lambda: FSP(facts(8), facts(8)), "neighbouring stages and got .* both models need two")


def ft_at(criterion: FT, epoch: int):
    outputs = [model_output(side, Needs(stages=(-1,))) for side in ("student", "teacher")]
    loss, found = criterion(*outputs, Target(LABELS, progress=Progress(epoch, 1, 10)))
    return loss, found, outputs[0].feature_map


def test_ft_trains_the_paraphraser_first_and_the_student_afterwards():
    criterion = FT(**FACTS, paraphraser_epochs=3, paraphraser_weight=0.5)
    for epoch, trained in ((2, "paraphraser"), (3, "translate")):
        criterion.zero_grad()
        loss, found, feature_map = ft_at(criterion, epoch)
        loss.backward()
        reached = {name for name, parameter in criterion.named_parameters() if parameter.grad is not None}
        assert reached == {name for name, _ in criterion.named_parameters() if name.startswith(trained)}
        assert (feature_map.grad is None) == (epoch == 2)
        assert list(found) == [{2: "reconstruction", 3: "factor"}[epoch]]
    assert ft_at(criterion, 0)[0].item() == pytest.approx(0.5 * ft_at(criterion, 0)[1]["reconstruction"].item())


def test_fts_loss_does_not_see_the_size_of_factors():
    student, teacher = rows(3, 4, 4, 4), rows(3, 5, 4, 4, seed=1)
    torch.testing.assert_close(ft_loss(student * 7, teacher), ft_loss(student, teacher / 3))
    assert ft_loss(teacher * 2, teacher).max() < 1e-15


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: VID(**FACTS, initial_variance=0.0), "initial_variance 0.0 must be finite and above"),
        (lambda: CC(**FACTS, data=DataFacts(40, DATA.sample_labels, 1)), "each image with the next one .* got 1; give two"),
        (lambda: CC(**FACTS, data=DATA, embedding=0), "embedding 0 must be at least 1"),
        (lambda: CC(facts(8), facts(8), DATA), "last linear layer reads, and the student has no such layer"),
        (lambda: SRRL(**FACTS), "the teacher's classifier, and this one has none"),
        (lambda: AB(**FACTS, margin=-1.0), "margin -1.0 must be finite and not negative"),
        (lambda: AB(**FACTS, stages=(0,)), "must be 'all' or indices from the end"),
        (lambda: FT(**FACTS, rate=0.01), "rate 0.01 leaves none of the teacher's 12 channels"),
        (lambda: FT(**FACTS, paraphraser_epochs=0), "paraphraser_epochs 0 must be at least 1"),
        (lambda: FT(**FACTS, paraphraser_weight=-1.0), "paraphraser_weight -1.0 must be finite"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(make, says):
    refused_in_one_line(make, says)
