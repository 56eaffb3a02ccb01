"""Schedules are pure functions of progress; parameter groups hold every trained parameter once."""

import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from distill.optim import create_optimizer, layer_scales, learning_rate_schedule, parameter_groups, weight_schedule
from distill.protocols import Progress


def at(step: int, steps_per_epoch: int = 10, epochs: int = 100) -> Progress:
    return Progress(step, steps_per_epoch, steps_per_epoch * epochs)


def test_step_decay_starts_with_the_epoch_after_the_named_one():
    rate = learning_rate_schedule("step", peak=0.2, decay_epochs=(30, 60, 90))
    assert rate(at(0)) == 0.2
    assert rate(at(299)) == 0.2
    assert rate(at(300)) == pytest.approx(0.02)
    assert rate(at(999)) == pytest.approx(0.0002)


def test_cosine_goes_from_peak_to_minimum_after_warm_up():
    rate = learning_rate_schedule("cosine", peak=1.0, warmup_epochs=5, minimum=0.1)
    assert rate(at(0)) == pytest.approx(1 / 50)
    assert rate(at(49)) == pytest.approx(1.0)
    assert rate(at(50)) == pytest.approx(1.0)
    assert rate(at(525)) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(at(1000)) == pytest.approx(0.1)
    values = [rate(at(s)) for s in range(50, 1000)]
    assert values == sorted(values, reverse=True)


def test_constant_stays():
    assert {learning_rate_schedule("constant", peak=0.3)(at(s)) for s in range(0, 1000, 7)} == {0.3}


def test_weight_warm_up_is_piecewise_constant_over_epochs_and_counts_from_one():
    weight = weight_schedule(0.9, warmup_epochs=20)
    assert weight(at(0)) == weight(at(9)) == pytest.approx(0.9 / 20)
    assert weight(at(10)) == pytest.approx(2 * 0.9 / 20)
    assert weight(at(190)) == weight(at(999)) == pytest.approx(0.9)


def test_weight_can_start_late_and_end_elsewhere():
    late = weight_schedule(1.0, start_epoch=10)
    assert late(at(99)) == 0.0
    assert late(at(100)) == 1.0
    for decay in ("linear", "cosine"):
        fading = weight_schedule(1.0, final_weight=0.0, decay=decay)
        assert fading(at(0)) == 1.0
        assert fading(at(500)) == pytest.approx(0.5)
        assert fading(at(1000)) == pytest.approx(0.0)
        later = weight_schedule(1.0, final_weight=0.0, decay=decay, decay_start_epoch=60)
        assert {later(at(step)) for step in range(0, 601, 50)} == {1.0}
        assert later(at(800)) == pytest.approx(0.5)
        assert later(at(1000)) == pytest.approx(0.0)


def test_a_term_that_stops_counts_in_the_epochs_before():
    weight = weight_schedule(2.0, start_epoch=10, stop_epoch=30)
    assert [weight(at(step)) for step in (99, 100, 299, 300, 999)] == [0.0, 2.0, 2.0, 0.0, 0.0]
    assert weight_schedule(2.0, stop_epoch=0)(at(0)) == 0.0


def test_a_term_that_starts_after_its_decay_should_begins_its_decay_with_itself():
    weight = weight_schedule(1.0, start_epoch=50, final_weight=0.0, decay_start_epoch=20)
    assert [weight(at(step)) for step in (499, 500, 750)] == [0.0, 1.0, pytest.approx(0.5)]


def test_every_trained_parameter_is_in_one_group_and_frozen_ones_in_none():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    for decay_all in (True, False):
        groups = parameter_groups(model, 0.1, decay_all)
        found = [id(p) for g in groups for p in g["params"]]
        assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    decayed, plain = parameter_groups(model, 0.1, False)
    assert {p.ndim for p in plain["params"]} == {1}
    assert plain["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.1


def test_what_timm_spares_by_name_is_decayed_only_where_everything_is():
    """timm's own groups are the oracle."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    inside = nn.Sequential(model)  # the student is a part of what the optimiser sees

    def names(groups: list[dict]) -> set[str]:
        plain = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
        return {name for name, p in model.named_parameters() if id(p) in plain}

    expected = names(param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay()))
    assert {"pos_embed", "cls_token"} <= expected
    assert names(parameter_groups(inside, 0.1, decay_bias_and_norm=False)) == expected
    assert names(parameter_groups(inside, 0.1, decay_bias_and_norm=True)) == set()


@pytest.mark.parametrize("min_scale", [0.0, 0.1])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto"])
def test_each_layers_share_of_the_rate_and_decay_are_timms(name: str, min_scale: float):
    model = timm.create_model(name, num_classes=3)
    inside = nn.ModuleDict({"student": model, "projector": nn.Linear(2, 2)})

    def settings(groups: list[dict], of: nn.Module) -> dict[str, tuple[float, float]]:
        names = {id(p): name for name, p in of.named_parameters()}
        return {names[id(p)]: (each["lr_scale"], each["weight_decay"]) for each in groups for p in each["params"]}

    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    options = {"layer_decay": 0.75, "min_scale": min_scale}
    theirs = settings(param_groups_layer_decay(model, 0.1, spared, **options), model)
    ours = settings(parameter_groups(inside, 0.1, False, 0.75, min_scale), inside)
    assert ours == {f"student.{key}": value for key, value in theirs.items()} | {
        "projector.weight": (1.0, 0.1),
        "projector.bias": (1.0, 0.0),
    }
    assert {scale for scale, _ in settings(parameter_groups(inside, 0.1, True, 0.75), inside).values()} == {
        *layer_scales(inside, 0.75).values()
    }


def test_the_layers_of_a_vit_and_of_a_convnext_have_these_shares():
    vit = layer_scales(timm.create_model("vit_tiny_patch16_224"), 0.75)
    by_layer = {"cls_token": 13, "pos_embed": 13, "patch_embed.proj.weight": 13, "blocks.0.attn.qkv.weight": 12}
    by_layer |= {"blocks.10.mlp.fc2.bias": 2, "blocks.11.norm1.weight": 1, "norm.weight": 1, "head.weight": 0}
    assert {name: vit[name] for name in by_layer} == {name: 0.75**below for name, below in by_layer.items()}
    convnext = layer_scales(timm.create_model("convnext_atto"), 0.5)
    by_layer = {"stem.0.weight": 13, "stages.0.blocks.0.conv_dw.weight": 12, "stages.0.blocks.1.conv_dw.weight": 11}
    by_layer |= {"stages.1.downsample.1.weight": 10, "stages.3.blocks.1.mlp.fc2.weight": 1, "head.fc.weight": 0}
    assert {name: convnext[name] for name in by_layer} == {name: 0.5**below for name, below in by_layer.items()}


def test_without_layer_decay_groups_have_no_share_and_a_model_without_layers_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert [set(group) for group in parameter_groups(model, 0.1, False)] == [{"params", "weight_decay"}] * 2
    with pytest.raises(ValueError, match=r"the student does not name its layers \(timm's group_matcher\); say 1"):
        parameter_groups(model, 0.1, False, 0.9)


def test_sgd_is_the_papers_sgd_unless_nesterov_is_asked():
    """timm's own `sgd` is Nesterov; a paper's recipe run with it would be another recipe."""

    def one_step(**options: bool) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(3, 1)
        arguments = {
            "learning_rate": 0.1,
            "weight_decay": 0.0,
            "momentum": 0.9,
            "decay_bias_and_norm": True,
            "options": options,
        }
        optimizer = create_optimizer(layer, "sgd", **arguments)
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return layer.weight.detach().clone()

    torch.manual_seed(0)
    start = nn.Linear(3, 1).weight.detach()
    assert torch.allclose(one_step(), start - 0.1 * (1 + 1.9))
    assert torch.allclose(one_step(nesterov=True), start - 0.1 * (1.9 + 1 + 0.9 * 1.9))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_optimisers_of_the_factory_step(name: str):
    layer = nn.Linear(3, 1)
    before = layer.weight.detach().clone()
    optimizer = create_optimizer(
        layer, name, learning_rate=0.1, weight_decay=0.01, momentum=0.9, decay_bias_and_norm=False, options=None
    )
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)


def test_unknown_optimiser_or_option_is_refused_by_name():
    layer = nn.Linear(3, 1)
    arguments = {"learning_rate": 0.1, "weight_decay": 0.0, "momentum": 0.9, "decay_bias_and_norm": True}
    with pytest.raises(ValueError, match="'sgdd' is unknown to timm"):
        create_optimizer(layer, "sgdd", **arguments)
    with pytest.raises(ValueError, match="do not fit 'adamw'"):
        create_optimizer(layer, "adamw", **arguments, options={"speed": math.pi})


def test_fused_sgd_begins_as_pytorchs_own_does():
    ends = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        options = {"learning_rate": 0.1, "weight_decay": 1e-3, "momentum": 0.9, "decay_bias_and_norm": True}
        optimizer = create_optimizer(model, "sgd", **options, options={"fused": True} if fused else None)
        assert bool(optimizer.state) == fused
        if not fused:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=True)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.full((2, 5), 1.0 + step)).square().sum().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
