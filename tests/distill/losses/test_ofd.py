"""OFD's margins and partial distance, and how stages of two models meet in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.ofd import OFD, batchnorm_margin, measured_margin, partial_distance
from distill.protocols import Affine, ModelFacts, ModelOutput, Target
from tests.distill.losses.outputs import facts

TARGET = Target(torch.zeros(4, dtype=torch.int64))
MARGIN = torch.tensor([-0.5, -1.0, -0.1], dtype=torch.float64)


def maps(seed: int, channels: int = 3, grid=(5, 4), size: float = 1.0) -> torch.Tensor:
    """A random signed map [4, C, *grid], float64."""
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(4, channels, *grid, generator=generator, dtype=torch.float64)


def output(*stages: torch.Tensor) -> ModelOutput:
    """A model output with these pre-activations."""
    inner = {number - len(stages): each for number, each in enumerate(stages)}
    return ModelOutput(stages[-1][:, :, 0, 0], stages[-1].relu(), {}, {}, {}, inner)


def with_norms(model: ModelFacts, *norms: Affine | None) -> ModelFacts:
    """The facts with these BatchNorms."""
    return ModelFacts(model.num_classes, model.stages, preactivation_norms=norms)


def affine(channels: int) -> Affine:
    """An ordinary BatchNorm."""
    return Affine(torch.linspace(0.5, 1.5, channels), torch.linspace(-0.5, 0.5, channels))


def test_the_margin_is_the_mean_of_the_negative_part_of_a_normal():
    for bias, weight in ((0.0, 1.0), (0.7, 1.3), (-2.0, 0.4), (1.5, -1.0)):
        x = bias + abs(weight) * torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        margin = batchnorm_margin(torch.tensor([weight]).double(), torch.tensor([bias]).double())
        assert abs(margin.item() - x[x < 0].mean().item()) < 0.005


def test_the_margin_jumps_to_3_deviations_where_the_channel_is_hardly_ever_negative():
    margins = batchnorm_margin(torch.tensor([2.0, 2.0, 1.0]).double(), torch.tensor([2 * 3.0902, 2 * 3.0903, 100.0]).double())
    torch.testing.assert_close(
        margins / torch.tensor([2.0, 2.0, 1.0]), torch.tensor([-0.277, -3, -3]).double(), rtol=0.01, atol=0
    )


def test_a_batchnorm_that_starts_at_zero_has_a_finite_margin():
    weight, bias = torch.tensor([0.0, 0.0, 0.0, 1e-40, 1e-30]), torch.tensor([0.0, 0.5, -0.5, -0.5, -0.5])
    assert batchnorm_margin(weight, bias).tolist() == [0.0, 0.0, -0.5, -0.5, -0.5]


def test_the_measured_margin_is_the_mean_of_negative_values_and_0_without_any():
    teacher = maps(0)
    teacher[:, 1] = teacher[:, 1].abs()
    expected = [each[each < 0].mean() if (each < 0).any() else torch.zeros(()).double() for each in teacher.unbind(1)]
    torch.testing.assert_close(measured_margin(teacher), torch.stack(expected))


def test_nothing_is_asked_of_a_student_at_the_wanted_map_or_below_a_margin_that_the_teacher_is_below():
    teacher = maps(0)
    wanted = torch.maximum(teacher, MARGIN[:, None, None])
    assert partial_distance(wanted, teacher, MARGIN).abs().max() == 0
    below = MARGIN[:, None, None] - teacher.abs()
    student = (MARGIN[:, None, None] - maps(1).abs()).requires_grad_()
    loss = partial_distance(student, below, MARGIN)
    (slope,) = torch.autograd.grad(loss.sum(), student)
    assert loss.abs().max() == 0
    assert slope.abs().max() == 0


def test_where_the_teacher_is_positive_it_is_the_squared_error():
    teacher, student = maps(0).abs() + 0.1, maps(1)
    torch.testing.assert_close(partial_distance(student, teacher, MARGIN), (student - teacher).square().sum((1, 2, 3)))


def test_it_scales_with_the_square_of_the_maps():
    student, teacher = maps(0), maps(1)
    torch.testing.assert_close(
        partial_distance(3 * student, 3 * teacher, 3 * MARGIN), 9 * partial_distance(student, teacher, MARGIN)
    )


def test_it_rises_with_the_student_where_the_teacher_is_below_the_margin():
    teacher = (MARGIN[:, None, None] - 1).expand(4, 3, 5, 4)
    losses = [
        partial_distance(torch.full((4, 3, 5, 4), level).double(), teacher, MARGIN).sum() for level in (-2.0, -0.5, 0.0, 1.0)
    ]
    assert losses == sorted(losses)


def test_the_last_stage_weighs_1_and_each_before_it_half():
    teacher = with_norms(facts(3, 4, 5), affine(3), affine(4), affine(5))
    criterion = OFD(facts(4, 6, 8), teacher).double()
    student = [maps(i, width, (6, 6)).requires_grad_() for i, width in enumerate((4, 6, 8))]
    loss, found = criterion(output(*student), output(*(maps(9 + i, w, (6, 6)) for i, w in enumerate((3, 4, 5)))), TARGET)
    torch.testing.assert_close(loss.detach(), found["stage-1/loss"] + found["stage-2/loss"] / 2 + found["stage-3/loss"] / 4)
    loss.backward()
    assert all(each.grad.abs().max() > 0 for each in student)
    assert all(p.grad is not None for p in criterion.parameters())


def test_stages_are_paired_from_the_end_and_can_be_chosen():
    teacher = with_norms(facts(2, 3, 4, 5), *(affine(width) for width in (2, 3, 4, 5)))
    assert OFD(facts(4, 6), teacher).stages == (-2, -1)
    chosen = OFD(facts(4, 6, 8), teacher, stages=(-1, -3))
    assert chosen.stages == (-3, -1)
    assert [(c[0].in_channels, c[0].out_channels) for c in chosen.connectors] == [(4, 3), (8, 5)]
    assert chosen.margin0.shape == (3,)


@pytest.mark.parametrize(("grid", "teacher_grid"), [((4, 4), (8, 8)), ((6, 6), (4, 4)), ((3, 2), (5, 4))])
def test_the_teachers_map_is_averaged_to_the_students_grid(grid, teacher_grid):
    criterion = OFD(facts(4), with_norms(facts(3), affine(3))).double()
    student, teacher = maps(0, 4, grid), maps(1, 3, teacher_grid)
    loss, _ = criterion(output(student), output(teacher), TARGET)
    wanted = F.adaptive_avg_pool2d(teacher, grid)
    expected = partial_distance(criterion.connectors[0](student), wanted, batchnorm_margin(*affine(3))).mean()
    torch.testing.assert_close(loss, expected)


def test_a_stage_without_batchnorm_has_its_margin_measured():
    teacher = with_norms(facts(3, 3), affine(3), None)
    criterion, measuring = OFD(facts(3, 3), teacher).double(), OFD(facts(3, 3), facts(3, 3), margins="measured").double()
    assert criterion.margin1 is None
    assert measuring.margin0 is None
    student, theirs = (maps(0), maps(1)), (maps(2), maps(3))
    loss, found = criterion(output(*student), output(*theirs), TARGET)
    expected = partial_distance(criterion.connectors[1](student[1]), theirs[1], measured_margin(theirs[1])).mean()
    torch.testing.assert_close(found["stage-1/loss"], expected.detach())
    assert loss.isfinite()


def test_margins_are_no_state_of_a_checkpoint():
    assert not any("margin" in name for name in OFD(facts(3), with_norms(facts(3), affine(3))).state_dict())


def test_a_sum_that_half_precision_cannot_hold_is_finite():
    student, teacher = torch.full((1, 3, 56, 56), 30.0).half(), torch.full((1, 3, 56, 56), -30.0).half()
    assert partial_distance(student, teacher, MARGIN).isfinite().all()


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [((64, 128, 256), (64, 128, 256), 86912), ((128, 256, 512, 1024), (256, 512, 1024, 2048), 2792960)],
)
def test_it_has_the_released_number_of_parameters(student, teacher, count):
    assert sum(p.numel() for p in OFD(facts(*student), facts(*teacher)).parameters()) == count


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"stages": (-1, -1)}, "must be 'all' or indices from the end, each once"),
        ({"stages": (0,)}, "must be 'all' or indices from the end"),
        ({"stages": (-3,)}, "stage -3 does not exist: the model has 2 stages"),
        ({"margins": "mean"}, "margins 'mean' is unknown"),
        ({"kernel_size": 2}, "kernel_size 2 must be odd"),
    ],
)
def test_options_that_cannot_be_right_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        OFD(facts(4, 6), facts(3, 5), **options)
