"""FitNet's regressor has the papers' parameters, and its loss is a mean squared error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.losses.fitnet import FitNet, FitNetRegressor, fitnet_loss
from distill.protocols import MapShape, ModelFacts, ModelOutput, Needs, Target
from tests.distill.losses.outputs import FACTS, made
from tests.distill.losses.relations import rows

LABELS = torch.tensor([0, 3, 5, 1])
# of the papers' CIFAR pairs: channels and side of both maps -> parameters
PARAMETERS = {
    "resnet110-resnet32": ((32, 16), (32, 16), 1_120),
    "resnet32x4-resnet8x4": ((128, 16), (128, 16), 16_768),
    "resnet32x4-ShuffleNetV1": ((480, 8), (128, 16), 983_424),
    "resnet32x4-ShuffleNetV2": ((232, 8), (128, 16), 475_520),
    "wrn40_2-vgg8": ((256, 8), (64, 16), 262_336),
}


@pytest.mark.parametrize("pair", PARAMETERS)
def test_the_regressor_has_the_parameters_of_the_reference(pair):
    (student, side), (teacher, teacher_side), count = PARAMETERS[pair]
    regressor = FitNetRegressor(student, teacher, (side, side), (teacher_side, teacher_side))
    assert sum(parameter.numel() for parameter in regressor.parameters()) == count


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((8, 8), (4, 4), (3, 3)),
        ((4, 4), (8, 8), (4, 4)),
        ((7, 7), (7, 7), (1, 1)),
        ((16, 16), (7, 7), (10, 10)),
        ((7, 5), (5, 4), (3, 2)),
    ],
)
def test_the_convolution_follows_the_heights(student, teacher, kernel):
    regressor = FitNetRegressor(3, 5, student, teacher)
    assert regressor.conv.kernel_size == kernel
    assert regressor(torch.randn(2, 3, *student)).shape == (2, 5, *teacher)


def test_a_regressor_that_changes_nothing_leaves_no_loss():
    regressor = FitNetRegressor(5, 5, (4, 4), (4, 4)).double().eval()
    nn.init.dirac_(regressor.conv.weight)
    nn.init.zeros_(regressor.conv.bias)
    regressor.bn.eps = 1e-30  # PyTorch refuses 0 from 2.11 on; beside a variance of 1 this is none
    teacher = rows(3, 5, 4, 4).relu()
    assert fitnet_loss(regressor(teacher), teacher).max() < 1e-30


def test_the_loss_falls_with_the_square_of_the_residual_and_is_the_mean_of_each_image():
    teacher, residual = rows(3, 5, 4, 4), rows(3, 5, 4, 4, seed=1)
    losses = fitnet_loss(teacher + residual, teacher)
    torch.testing.assert_close(fitnet_loss(teacher + residual / 10, teacher), losses / 100)
    torch.testing.assert_close(losses, residual.square().mean((1, 2, 3)))


def test_features_of_300_do_not_overflow_in_half_precision():
    assert fitnet_loss(torch.full((2, 3, 4, 4), 300.0).half(), torch.zeros(2, 3, 4, 4).half()).tolist() == [9e4, 9e4]


def test_without_relu_negative_targets_can_be_reached():
    teacher = -torch.ones(2, 5, 4, 4)
    for relu in (True, False):
        regressor = FitNetRegressor(3, 5, (4, 4), (4, 4), relu=relu)
        nn.init.zeros_(regressor.bn.weight)
        nn.init.constant_(regressor.bn.bias, -1.0)
        assert fitnet_loss(regressor(torch.randn(2, 3, 4, 4)), teacher).max().item() == (1.0 if relu else 0.0)


def test_the_criterion_compares_the_second_stages_unless_told_otherwise():
    assert made("fitnet").student_needs == Needs(stages=(-2,))
    assert made("fitnet").teacher_needs == Needs(stages=(-3,))
    assert made("fitnet", pair=(-1, -2)).teacher_needs == Needs(stages=(-2,))
    one = ModelFacts(6, (MapShape(4, 14, 14),))
    assert FitNet(one, one).student_needs == Needs(stages=(-1,))


@pytest.mark.parametrize("grids", [((7, 7), (16, 16)), ((16, 16), (7, 7)), ((5, 9), (7, 7))])
def test_any_two_grids_meet_where_the_larger_map_is_pooled(grids):
    student, teacher = (ModelFacts(6, (MapShape(width, *grid),)) for width, grid in zip((8, 12), grids, strict=True))
    criterion = FitNet(student, teacher, match="pool")
    assert sum(parameter.numel() for parameter in criterion.parameters()) == 8 * 12 + 3 * 12
    maps = [torch.randn(4, width, *grid) for width, grid in zip((8, 12), grids, strict=True)]
    outputs = [ModelOutput(torch.zeros(4, 6), feature_map, {}, {}, {}) for feature_map in maps]
    loss, _ = criterion(*outputs, Target(LABELS))
    loss.backward()
    assert all(parameter.grad is not None for parameter in criterion.parameters())


def test_a_pair_of_maps_that_no_convolution_serves_is_refused_with_the_remedy():
    for student, teacher in (((7, 7), (16, 16)), ((8, 8), (4, 5)), ((4, 4), (8, 7))):
        small, large = (ModelFacts(6, (MapShape(8, *grid),)) for grid in (student, teacher))
        with pytest.raises(ValueError, match=r"no convolution brings .* set match: pool"):
            FitNet(small, large)
    with pytest.raises(ValueError, match="match 'conv' is unknown; choose one of convolution, pool"):
        FitNet(**FACTS, match="conv")
    with pytest.raises(ValueError, match="stage 3 does not exist: the model has 3 stages"):
        FitNet(**FACTS, pair=(3, 3))
