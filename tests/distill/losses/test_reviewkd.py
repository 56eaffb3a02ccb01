"""ReviewKD fuses levels from the deep end, and compares each with the teacher's at several sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distill.losses.reviewkd import POOLED, FusionBlock, ReviewKD, hierarchical_loss
from distill.optim import weight_schedule
from distill.protocols import DataFacts, MapShape, ModelFacts, ModelOutput, Progress, Target
from tests.distill.losses.outputs import FACTS, facts

DATA = DataFacts(4, torch.zeros(4, dtype=torch.int64), 4)
TARGET = Target(torch.zeros(4, dtype=torch.int64))


def output(shapes, batch: int = 4, seed: int = 0, dtype=torch.float32) -> ModelOutput:
    """A model output of random stages; pre-activations are other numbers than the stages, which are theirs after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    inner = {
        i - len(shapes): torch.randn(batch, *shape, generator=generator).to(dtype).requires_grad_()
        for i, shape in enumerate(shapes)
    }
    stages = {i: each.relu() for i, each in inner.items()}
    last = stages[-1]
    return ModelOutput(last[:, :, 0, 0], last, {}, {POOLED: last.mean((2, 3))[:, None]}, stages, inner)


def pair(**changes) -> tuple[ModelOutput, ModelOutput]:
    """Outputs of the models that FACTS describe."""
    return output(FACTS["student"].stages, **changes), output(FACTS["teacher"].stages, seed=1, **changes)


def test_a_level_is_0_for_equal_maps_and_c_squared_for_a_constant_shift():
    for grid in ((1, 1), (2, 2), (3, 3), (4, 4), (7, 7), (5, 9)):
        teacher = torch.randn(3, 4, *grid, dtype=torch.float64)
        assert hierarchical_loss(teacher, teacher).abs().max() == 0
        torch.testing.assert_close(hierarchical_loss(teacher + 1.5, teacher), torch.full((3,), 2.25, dtype=torch.float64))


@pytest.mark.parametrize(("side", "levels"), [(8, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_only_sizes_below_the_map_count_and_each_weighs_half_of_the_last(side, levels):
    student, teacher = torch.randn(2, 3, 4, side, side, dtype=torch.float64)
    expected = F.mse_loss(student, teacher)
    weights = [0.5 ** (i + 1) for i in range(len(levels))]
    for level, weight in zip(levels, weights, strict=True):
        expected = expected + weight * F.mse_loss(F.adaptive_avg_pool2d(student, level), F.adaptive_avg_pool2d(teacher, level))
    torch.testing.assert_close(hierarchical_loss(student, teacher).mean(), expected / (1 + sum(weights)))


def test_levels_are_paired_from_the_deep_end_whatever_the_number_of_stages():
    for student, teacher in (("student", "teacher"), ("teacher", "student")):
        criterion = ReviewKD(FACTS[student], FACTS[teacher], DATA)
        widths = [(block.reduce[0].in_channels, block.expand[0].out_channels) for block in criterion.blocks]
        mine, theirs = ([stage.channels for stage in FACTS[side].stages[:-4:-1]] for side in (student, teacher))
        assert widths == [(mine[0], theirs[0]), *zip(mine, theirs, strict=True)]
        outputs = {"student": pair()[0], "teacher": pair()[1]}
        loss, found = criterion(outputs[student], outputs[teacher], TARGET)
        assert list(found) == ["pooled/loss", "stage-1/loss", "stage-2/loss", "stage-3/loss"]
        torch.testing.assert_close(loss.detach(), sum(found.values()))


@pytest.mark.parametrize("preactivations", [False, True])
def test_every_level_and_parameter_gets_a_gradient_and_the_teacher_none(preactivations):
    criterion = ReviewKD(**FACTS, data=DATA, student_preactivations=preactivations)
    student, teacher = pair()
    criterion(student, teacher, TARGET)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in criterion.parameters())
    assert all(each.grad.abs().max() > 0 for each in student.preactivations.values())
    assert all(each.grad is None for each in teacher.preactivations.values())


def test_deep_levels_hear_of_shallow_ones_through_the_carry():
    criterion = ReviewKD(**FACTS, data=DATA)
    student, teacher = pair()
    carry = None
    for block, own, other in zip(
        criterion.blocks,
        [student.region_features[POOLED].transpose(1, 2)[..., None], *(student.stages[i] for i in criterion.stages)],
        [teacher.region_features[POOLED].transpose(1, 2)[..., None], *(teacher.preactivations[i] for i in criterion.stages)],
        strict=True,
    ):
        fused, carry = block(own, carry, other.shape[-2:])
        assert fused.shape == other.shape
        assert carry.shape[-2:] == other.shape[-2:]
    (slope,) = torch.autograd.grad(fused.square().mean(), student.preactivations[-1])
    assert slope.abs().max() > 0


def test_maps_that_are_not_square_and_equal_grids_of_tokens_are_served():
    for shapes in (((4, 6, 10), (5, 3, 5)), ((4, 5, 5), (4, 5, 5))):
        student = ModelFacts(6, tuple(MapShape(*shape) for shape in shapes))
        criterion = ReviewKD(student, facts(6, 7), DATA)
        assert criterion(output(shapes), output(facts(6, 7).stages), TARGET)[0].isfinite()


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [
        ((64, 128, 256), (64, 128, 256), 1808774),  # resnet8x4 from resnet32x4
        ((240, 480, 960), (64, 128, 256), 4607366),  # ShuffleNetV1 from resnet32x4
        ((64, 128, 256, 512), (64, 128, 256, 512), 7552904),  # ResNet-18 from ResNet-34
    ],
)
def test_it_has_the_released_number_of_parameters(student, teacher, count):
    assert sum(p.numel() for p in ReviewKD(facts(*student), facts(*teacher), DATA).parameters()) == count


def test_the_carry_is_not_read_by_the_deepest_block():
    block = FusionBlock(4, 3, 5, deepest=True)
    assert block.gate is None
    assert block(torch.randn(2, 4, 1, 1), None, (1, 1))[0].shape == (2, 5, 1, 1)


def test_the_released_warm_up_is_a_schedule_of_the_weight():
    at = weight_schedule(5.0, warmup_epochs=20)
    assert [at(Progress(epoch, 1, 240)) for epoch in (0, 9, 19, 100)] == [0.25, 2.5, 5.0, 5.0]


def test_what_cannot_be_served_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="a micro-batch of 1 has no deviation; take 2"):
        ReviewKD(**FACTS, data=DATA._replace(micro_batch=1))
    with pytest.raises(ValueError, match="middle_channels -1 must be positive"):
        ReviewKD(**FACTS, data=DATA, middle_channels=-1)
