"""DOT moves weights as the paper's equations and the authors' code do; without a difference of momenta it is SGD."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from distill.dot import DOT
from distill.optim import create_optimizer

PIXELS = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)


def parameters() -> list[Tensor]:
    """A stem that both losses reach, a head of the task alone, an offset of the distillation alone."""
    stem, head, offset = [[0.5, -0.25], [0.125, 0.75]], [1.0, -0.5], [0.0, 0.0]
    return [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (stem, head, offset)]


def losses(weights: list[Tensor], step: int, images: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """The task's and the distillation's, of some of the images."""
    stem, head, offset = weights
    hidden = (PIXELS[images] @ stem).tanh()
    return (hidden @ head - step / 4).square().mean(), (hidden + offset - 0.3 * (1 + step)).square().mean()


def make_step(optimizer: DOT, weights: list[Tensor], step: int, parts: int = 1) -> None:
    for images in (slice(None),) if parts == 1 else (slice(0, 1), slice(1, 2)):
        task, distillation = (loss / parts for loss in losses(weights, step, images))
        optimizer.separate(task, distillation)
        (task + distillation).backward()
    optimizer.step()
    optimizer.zero_grad()


AFTER_STEP = {
    1: ([0.2802885296334551, -0.19363009030210537, 0.12117752769908498, 0.6969207084685148],
        [0.9144921621749783, -0.45838936674347336], [0.03764211032867351, -0.08028833623068952]),
    2: ([-0.07160567071981268, -0.12380686173380254, 0.2793180272681079, 0.6092905786024079],
        [0.8250999176877224, -0.3210540543576888], [0.1575657156932993, -0.1491583727889446]),
    6: ([-1.3281475384367971, -0.43187632164513684, 1.701726424674696, 0.9355783462225903],
        [1.0594327394717389, 0.705403607645845], [0.967565711729776, 0.831764439276495]),
}  # fmt: skip
"""What mdistiller's DistillationOrientedTrainer (a08d46f) makes of the same weights and losses, with the momenta that its
trainer gives it for momentum 0.9 and delta 0.075. The offset begins at 0, so that the decay that it skips is 0 too."""


def test_the_authors_code_gives_the_same_weights():
    weights = parameters()
    optimizer = DOT(weights, 0.2, delta=0.075, momentum=0.9, weight_decay=0.01)
    for step in range(6):
        make_step(optimizer, weights, step)
        for found, expected in zip(weights, AFTER_STEP.get(step + 1, ()), strict=False):
            assert found.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_papers_equations_give_the_same_weights_whole_and_in_micro_batches(parts: int):
    """Two groups, with a rate and a decay each; everything begins away from 0."""
    rates, decays, momentum, delta = (0.02, 0.05, 0.05), (0.1, 0.0, 0.3), 0.9, 0.09
    ours, theirs = parameters(), parameters()
    for weights in (ours, theirs):
        weights[2].data.fill_(0.7)
    groups = [{"params": ours[:1], "lr": 0.02, "weight_decay": 0.1}, {"params": ours[1:2], "lr": 0.05, "weight_decay": 0.0}]
    groups.append({"params": ours[2:], "lr": 0.05, "weight_decay": 0.3})
    optimizer = DOT(groups, 1.0, delta=delta, momentum=momentum)
    velocities = [[torch.zeros_like(p), torch.zeros_like(p)] for p in theirs]
    for step in range(20):
        make_step(optimizer, ours, step, parts)
        sides = [torch.autograd.grad(loss, theirs, retain_graph=True, allow_unused=True) for loss in losses(theirs, step)]
        for p, v, rate, decay, of_task, of_distillation in zip(theirs, velocities, rates, decays, *sides, strict=True):
            if of_task is None or of_distillation is None:
                v[0] = momentum * v[0] + (of_distillation if of_task is None else of_task) + decay * p.detach()
            else:
                v[0] = (momentum - delta) * v[0] + of_task + decay * p.detach()
                v[1] = (momentum + delta) * v[1] + of_distillation
            p.data -= rate * (v[0] + v[1])
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours[0], parameters()[0], atol=0.1)


def test_without_a_difference_it_is_sgd_on_the_sum_and_so_is_a_step_that_separates_nothing():
    arguments = {"momentum": 0.9, "weight_decay": 0.01}
    equal, silent, theirs = parameters(), parameters(), parameters()
    without_difference, without_separation = (
        DOT(equal, 0.05, delta=0.0, **arguments),
        DOT(silent, 0.05, delta=0.09, **arguments),
    )
    sgd = torch.optim.SGD(theirs, 0.05, **arguments)
    for step in range(20):
        make_step(without_difference, equal, step)
        for weights, optimizer in ((silent, without_separation), (theirs, sgd)):
            optimizer.zero_grad()
            sum(losses(weights, step)).backward()
            optimizer.step()
    for mine, other in zip(equal, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)  # two momenta are rounded, and not their sum
    assert all(torch.equal(*pair) for pair in zip(silent, theirs, strict=True))


def test_a_step_that_is_not_made_leaves_nothing_to_the_next():
    begun, untouched = parameters(), parameters()
    optimizer, other = (DOT(weights, 0.1, delta=0.09) for weights in (begun, untouched))
    task, distillation = losses(begun, 7)
    optimizer.separate(task, distillation)
    (task + distillation).backward()
    optimizer.zero_grad()
    assert not optimizer.state
    make_step(optimizer, begun, 0)
    make_step(other, untouched, 0)
    assert all(torch.equal(*pair) for pair in zip(begun, untouched, strict=True))


def test_its_state_goes_on_in_another_optimiser():
    straight, first = parameters(), parameters()
    optimizer = DOT(straight, 0.1, delta=0.09)
    begun = DOT(first, 0.1, delta=0.09)
    for step in range(3):
        make_step(optimizer, straight, step)
        make_step(begun, first, step)
    resumed = DOT(first, 0.1, delta=0.09)
    resumed.load_state_dict(begun.state_dict())
    for step in range(3, 6):
        make_step(optimizer, straight, step)
        make_step(resumed, first, step)
    assert all(torch.equal(*pair) for pair in zip(straight, first, strict=True))


def test_it_is_made_with_the_groups_of_every_other_optimiser():
    arguments = {"learning_rate": 0.1, "weight_decay": 0.01, "momentum": 0.9, "decay_bias_and_norm": False}
    layer = nn.Linear(3, 2)
    ours = create_optimizer(layer, "dot", **arguments, options={"delta": 0.09})
    sgd = create_optimizer(layer, "sgd", **arguments)
    assert isinstance(ours, DOT)
    for mine, other in itertools.zip_longest(ours.param_groups, sgd.param_groups):
        assert [*map(id, mine["params"])] == [*map(id, other["params"])]
        assert {key: mine[key] for key in ("lr", "momentum", "weight_decay")} == {
            key: other[key] for key in ("lr", "momentum", "weight_decay")
        }


@pytest.mark.parametrize(
    ("momentum", "options", "said"),
    [
        (0.9, {"delta": 0.1}, r"optim.options: delta 0.1 and optim.momentum 0.9 make 1 or more; lower either"),
        (0.05, {"delta": 0.09}, r"optim.options: delta 0.09 is not between 0 and optim.momentum 0.05"),
        (0.9, {"delta": -0.01}, r"optim.options: delta -0.01 is not between 0 and"),
        (0.9, {"delta": "much"}, r"optim.options: delta much is no number; dot needs one, such as \{delta: 0.09\}"),
        (0.9, {}, r"optim.options: delta None is no number; dot needs one"),
        (0.9, {"delta": 0.09, "nesterov": True}, r"do not fit 'dot': .* unexpected keyword argument 'nesterov'"),
    ],
)
def test_momenta_outside_of_0_and_1_and_other_options_are_refused(momentum: float, options: dict, said: str):
    arguments = {"learning_rate": 0.1, "weight_decay": 0.0, "momentum": momentum, "decay_bias_and_norm": True}
    with pytest.raises(ValueError, match=said):
        create_optimizer(nn.Linear(3, 1), "dot", **arguments, options=options)
