"""WKD: transport between classes, and moments of a map's cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from distill.losses.wkd_feature import BottleneckProjector, WKDFeature, moments, wkd_feature_loss
from distill.losses.wkd_logit import FLOOR, WKDLogit, cka_distances, classifier_distances, transport_cost, wkd_logit_loss
from distill.models.build import create_teacher
from distill.protocols import MapShape, ModelFacts, ModelOutput, Needs, Target
from tests.distill.losses.outputs import FACTS, facts, made, model_output
from tests.distill.losses.refusals import refused_in_one_line
from tests.distill.losses.relations import rows, value_and_slope

STUDENT, TEACHER, LABELS = 2 * rows(4, 7), 2 * rows(4, 7, seed=1), torch.tensor([0, 6, 3, 3])
COST = transport_cost(cka_distances(rows(7, 9, 5, seed=2)))


def plain_transport(student, teacher, labels, cost, temperature=2.0, entropy=0.05, iterations=10):
    """Row by row, without the label's row and column, as the released code does for the whole batch at once."""
    found = []
    for mine, theirs, label in zip(student, teacher, labels, strict=True):
        keep = torch.arange(len(cost)) != label
        a, b = (F.softmax(logits[keep] / temperature, dim=0) for logits in (mine, theirs))
        costs = cost[keep][:, keep] + FLOOR
        kernel = torch.exp(-costs / entropy)
        u = torch.full_like(a, 1 / len(a))
        for _ in range(iterations):
            v = b / (kernel.T @ u + FLOOR)
            u = a / (kernel @ v + FLOOR)
        found.append((u[:, None] * kernel * v * costs).sum())
    return torch.stack(found)


def test_one_kernel_for_the_batch_gives_what_one_for_each_row_gives():
    for found, expected in zip(
        value_and_slope(wkd_logit_loss, STUDENT, TEACHER, LABELS, COST),
        value_and_slope(plain_transport, STUDENT, TEACHER, LABELS, COST),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)


def test_the_labels_logits_play_no_part():
    found, slope = value_and_slope(wkd_logit_loss, STUDENT, TEACHER, LABELS, COST)
    own = F.one_hot(LABELS, 7).bool()
    assert slope[own].abs().max() == 0
    torch.testing.assert_close(wkd_logit_loss(STUDENT.masked_fill(own, 50.0), TEACHER, LABELS, COST), found)


def test_soft_labels_count_as_their_largest_class():
    soft = 0.6 * F.one_hot(LABELS, 7) + 0.4 * F.one_hot((LABELS + 1) % 7, 7)
    assert torch.equal(wkd_logit_loss(STUDENT, TEACHER, soft.double(), COST), wkd_logit_loss(STUDENT, TEACHER, LABELS, COST))


def test_each_image_has_its_own_loss():
    whole = wkd_logit_loss(STUDENT, TEACHER, LABELS, COST)
    torch.testing.assert_close(wkd_logit_loss(STUDENT[2:], TEACHER[2:], LABELS[2:], COST), whole[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_of_thousands_are_finite_in_any_precision(dtype):
    student, teacher = (1000 * STUDENT).to(dtype), (1000 * TEACHER).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, slope = value_and_slope(wkd_logit_loss, student, teacher, LABELS, COST)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert slope.isfinite().all()
    torch.testing.assert_close(
        found.double(), wkd_logit_loss(student.double(), teacher.double(), LABELS, COST), rtol=1e-4, atol=1e-6
    )


def test_without_a_file_all_classes_are_equally_far_and_the_loss_is_near_a_total_variation():
    cost = transport_cost(1 - torch.eye(7, dtype=torch.float64))
    assert cost.unique().tolist() == pytest.approx([0.0, 0.6321205588])
    own = F.one_hot(LABELS, 7).bool()
    mine, theirs = ((each / 2).masked_fill(own, -torch.inf).softmax(1) for each in (STUDENT, TEACHER))
    variation = 0.5 * (mine - theirs).abs().sum(1)
    torch.testing.assert_close(wkd_logit_loss(STUDENT, TEACHER, LABELS, cost), 0.632 * variation, rtol=0.1, atol=0.01)
    criterion = made("wkd_logit")
    assert torch.equal(criterion.cost, transport_cost(1 - torch.eye(6, dtype=torch.float64)).float())
    assert not criterion.state_dict()


def test_distances_are_symmetric_and_0_to_oneself():
    for distances in (cka_distances(rows(7, 9, 5)), classifier_distances(rows(7, 5))):
        assert distances.diagonal().abs().max() < 1e-12
        torch.testing.assert_close(distances, distances.T)
        assert (distances > -1e-12).all()
    features = rows(7, 9, 5)
    torch.testing.assert_close(cka_distances(3 * features + 2), cka_distances(features))


def test_distances_come_from_a_file(tmp_path):
    distances = classifier_distances(rows(6, 5))
    save_file({"distance": distances}, tmp_path / "d.safetensors")
    criterion = made("wkd_logit", distances=str(tmp_path / "d.safetensors"), sharpening=2.0, temperature=3.0)
    student, teacher = (model_output(side, Needs()) for side in ("student", "teacher"))
    labels = torch.tensor([0, 3, 5, 1])
    expected = wkd_logit_loss(student.logits, teacher.logits, labels, transport_cost(distances, 2.0).float(), 3.0)
    assert criterion(student, teacher, Target(labels))[0] == expected.mean()
    with pytest.raises(ValueError, match=r"distances of the classes are \[6, 6\]; of 4 classes they must be \[4, 4\]"):
        WKDLogit(ModelFacts(4, ()), ModelFacts(4, ()), distances=str(tmp_path / "d.safetensors"))
    with pytest.raises(ValueError, match="is no file; say classifier, make a file of cka_distances, or leave it out"):
        made("wkd_logit", distances=str(tmp_path / "none"))
    save_file({"distances": distances}, tmp_path / "e.safetensors")
    with pytest.raises(ValueError, match=r"holds \['distances'\]; it must hold `distance`"):
        made("wkd_logit", distances=str(tmp_path / "e.safetensors"))


def test_distances_come_from_the_teachers_classifier_without_a_file():
    teacher = create_teacher("cifar_resnet8", weights="random", num_classes=6)
    weight = teacher.model.get_classifier().weight
    criterion = WKDLogit(FACTS["student"], teacher.facts, distances="classifier")
    assert torch.equal(criterion.cost, transport_cost(classifier_distances(weight)).float())
    assert not torch.equal(criterion.cost, made("wkd_logit").cost)
    some = replace(teacher, class_map=(4, 0, 2))  # a teacher of more classes, of which the data have three in another order
    criterion = WKDLogit(ModelFacts(3, ()), some.facts, distances="classifier")
    assert torch.equal(criterion.cost, transport_cost(classifier_distances(weight[[4, 0, 2]])).float())
    with pytest.raises(ValueError, match=r"'classifier' needs a teacher whose .* one linear layer, .* give a file"):
        WKDLogit(ModelFacts(6, ()), ModelFacts(6, ()), distances="classifier")


def test_two_classes_are_refused():
    with pytest.raises(ValueError, match="got 2 classes; it needs at least 3"):
        WKDLogit(ModelFacts(2, ()), ModelFacts(2, ()))
    with pytest.raises(ValueError, match="wkd_logit compares classes and got a student of 6 and a teacher of 0"):
        WKDLogit(FACTS["student"], ModelFacts(0, ()))
    with pytest.raises(ValueError, match=r"entropy 0\.0 must be positive"):
        made("wkd_logit", entropy=0.0)
    with pytest.raises(ValueError, match="iterations 0 must be at least 1"):
        made("wkd_logit", iterations=0)


@pytest.mark.parametrize(("size", "grid"), [((7, 7), 4), ((8, 8), 1), ((5, 9), 3), ((14, 14), 4)])
def test_moments_are_those_of_the_cells_of_adaptive_pooling(size, grid):
    feature_map = rows(3, 5, *size)
    mean, deviation = moments(feature_map, grid)
    torch.testing.assert_close(mean, F.adaptive_avg_pool2d(feature_map, grid).flatten(2))
    cell = feature_map[..., : -(-size[0] // grid), : -(-size[1] // grid)].flatten(2)
    torch.testing.assert_close(deviation[..., 0], (cell.var(2) + 1e-5).sqrt())


def test_a_variance_far_from_0_is_exact_in_float32():
    feature_map = 50 + torch.rand(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    expected = moments(feature_map.double(), 4)[1]
    torch.testing.assert_close(moments(feature_map, 4)[1].double(), expected, rtol=1e-5, atol=0)


def test_constant_maps_have_a_finite_gradient():
    loss, slope = value_and_slope(lambda s, t: sum(wkd_feature_loss(s, t, 2)), torch.ones(2, 3, 6, 6), rows(2, 3, 6, 6).float())
    assert loss.isfinite().all()
    assert slope.isfinite().all()


def test_equal_maps_are_perfect_and_means_and_deviations_are_apart():
    teacher = rows(3, 5, 6, 6)
    assert [part.max().item() for part in wkd_feature_loss(teacher, teacher, 2)] == [0, 0]
    means, deviations = wkd_feature_loss(teacher + 2, teacher, 2)
    torch.testing.assert_close(means, torch.full((3,), 4.0 * 5, dtype=torch.float64))  # summed over channels, mean over cells
    assert deviations.max() < 1e-24


def test_maps_of_any_two_sizes_meet_cell_by_cell():
    student, teacher = (ModelFacts(6, (MapShape(width, *grid),)) for width, grid in ((8, (14, 14)), (12, (7, 9))))
    for projector in ("bottleneck", "1x1"):
        criterion = WKDFeature(student, teacher, projector=projector)
        outputs = [ModelOutput(torch.zeros(4, 6), torch.randn(4, *facts.stages[0]), {}, {}, {}) for facts in (student, teacher)]
        loss, found = criterion(*outputs, Target(torch.zeros(4).long()))
        torch.testing.assert_close(loss.detach(), 2 * found["means"] + found["deviations"])
        loss.backward()
        assert all(parameter.grad is not None for parameter in criterion.parameters())


def test_the_bottleneck_has_the_parameters_of_the_released_one():
    count = sum(parameter.numel() for parameter in BottleneckProjector(512, 512).parameters())
    assert count == 512 * 256 + 256 + 9 * 256 * 256 + 256 + 256 * 512 + 512 + 2 * 512


REFUSED = {
    "cells of a pixel": (lambda: WKDFeature(facts(4), facts(4), grid=7), "grid 7 has cells of one pixel on a 7 x 7 map"),
    "no cells": (lambda: WKDFeature(**FACTS, grid=0), "grid 0 must be at least 1"),
    "channels": (lambda: WKDFeature(**FACTS, projector="none"), "projector 'none' leaves 8 channels, the teacher has 12"),
    "projector": (lambda: WKDFeature(**FACTS, projector="conv"), "projector 'conv' is unknown; choose one of bottleneck"),
    "sizes": (
        lambda: WKDFeature(ModelFacts(6, (MapShape(4, 7, 7),)), ModelFacts(6, (MapShape(4, 16, 16),)), projector="convolution"),
        "projector 'convolution' brings no 7 x 7 map to 16 x 16; choose 'bottleneck' or '1x1'",
    ),
    "maps": (lambda: wkd_feature_loss(rows(2, 3, 6, 6), rows(2, 4, 6, 6)), "3 and 4 channels; project the student's first"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_requests_are_refused_in_one_line(case):
    refused_in_one_line(*REFUSED[case])
