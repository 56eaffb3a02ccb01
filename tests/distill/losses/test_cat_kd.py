"""CAT-KD compares class activation maps: no bias has a part in it, and a map of zeros no explosion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.cat_kd import CATKD, cat_loss
from distill.protocols import MapShape, ModelFacts, ModelOutput, Target
from distill.regions import pool, region_matrix
from tests.distill.losses.outputs import FACTS, facts

LABELS = torch.tensor([0, 3, 5])


def maps(seed: int = 0, cells: int = 4) -> torch.Tensor:
    """Class activation maps [3, R, 6], float64."""
    return torch.randn(3, cells, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def output(criterion: CATKD, feature_map: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> ModelOutput:
    """What a backbone with a linear head gives."""
    regions = pool(feature_map, region_matrix(*feature_map.shape[-2:], criterion.regions)) @ weight.T + bias
    return ModelOutput(
        feature_map.mean((2, 3)) @ weight.T + bias, feature_map, {criterion.regions: regions}, {}, {}, head_bias=bias
    )


def test_equal_maps_are_0_with_gradient_0():
    student = maps().requires_grad_()
    for normalise in (False, True):
        loss = cat_loss(student, student.detach(), normalise)
        (slope,) = torch.autograd.grad(loss.sum(), student)
        assert loss.abs().max() == 0
        assert slope.abs().max() == 0


def test_normalised_maps_are_compared_whatever_their_size():
    student, teacher = maps(0), maps(1)
    expected = cat_loss(student, teacher, normalise=True)
    size = torch.rand(3, 1, 6) + 0.1
    torch.testing.assert_close(cat_loss(size * student, teacher, normalise=True), expected)
    torch.testing.assert_close(cat_loss(student, size * teacher, normalise=True), expected)
    assert (cat_loss(2 * student, teacher) - cat_loss(student, teacher)).abs().min() > 0.01


def test_a_students_bias_has_no_part_in_value_or_gradient():
    criterion = CATKD(**FACTS)
    feature_map, weight = torch.randn(3, 8, 7, 7, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    teacher = output(criterion, torch.randn(3, 12, 7, 7).double(), torch.randn(6, 12).double(), torch.randn(6).double())
    found = []
    for bias in (torch.zeros(6), torch.arange(6.0)):
        bias = bias.double().requires_grad_()
        loss, _ = criterion(output(criterion, feature_map, weight, bias), teacher, Target(LABELS))
        (slope,) = torch.autograd.grad(loss, bias)
        assert slope.abs().max() < 1e-15
        found.append(loss)
    torch.testing.assert_close(*found)


def test_one_cell_is_the_squared_error_of_bias_free_logits():
    criterion = CATKD(**FACTS, resolution=1)
    sides = [(torch.randn(3, c, 7, 7), torch.randn(6, c), torch.randn(6)) for c in (8, 12)]
    student, teacher = (output(criterion, *side) for side in sides)
    plain = F.mse_loss(*(each.logits - side[2] for each, side in zip((student, teacher), sides, strict=True)))
    torch.testing.assert_close(criterion(student, teacher, Target(LABELS))[0], plain)


@pytest.mark.parametrize("resolution", [2, 4])
def test_the_maps_are_those_of_pooling_the_class_activation_maps(resolution):
    """Pooling commutes with the classifier, also where windows overlap (7 x 7 to 4 x 4)."""
    criterion = CATKD(**FACTS, resolution=resolution)
    feature_map, weight, bias = torch.randn(3, 8, 7, 7), torch.randn(6, 8), torch.randn(6)
    teacher = output(criterion, torch.randn(3, 12, 14, 14), torch.randn(6, 12), torch.randn(6))
    cams = F.adaptive_avg_pool2d(torch.einsum("bchw,kc->bkhw", feature_map, weight), resolution)
    theirs = teacher.region_logits[criterion.regions] - teacher.head_bias
    expected = F.mse_loss(cams.flatten(2).transpose(1, 2), theirs)
    torch.testing.assert_close(criterion(output(criterion, feature_map, weight, bias), teacher, Target(LABELS))[0], expected)


def test_a_classifier_of_zeros_gets_a_finite_and_ordinary_gradient():
    criterion = CATKD(**FACTS, normalise=True)
    weight = torch.zeros(6, 8, requires_grad=True)
    student = output(criterion, torch.randn(3, 8, 7, 7), weight, torch.zeros(6))
    teacher = output(criterion, torch.randn(3, 12, 7, 7), torch.randn(6, 12), torch.zeros(6))
    criterion(student, teacher, Target(LABELS))[0].backward()
    assert weight.grad.isfinite().all()
    assert 0 < weight.grad.abs().max() < 1e6


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: CATKD(facts(4), ModelFacts(10, facts(4).stages)), "a student of 6 and a teacher of 10"),
        (lambda: CATKD(ModelFacts(0, facts(4).stages), ModelFacts(0, facts(4).stages)), "a student of 0"),
        (lambda: CATKD(facts(4), facts(4), resolution=0), "must be positive integers"),
        (lambda: CATKD(facts(4), facts(4), resolution=1, normalise=True), "all 1 or -1 .* set normalise to false"),
        (lambda: CATKD(ModelFacts(6, (MapShape(4, 1, 1),)), facts(4), normalise=True), "1 x 1.*set normalise to false"),
        (lambda: cat_loss(maps(), maps(cells=1)), "differ; both must have one shape"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(make, line):
    with pytest.raises(ValueError, match=line):
        make()
