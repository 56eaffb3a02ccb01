"""The ways to region logits of heads that are not a plain mean of an NCHW map, each on small members of its kind."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from torch import Tensor, nn

from distill.models.anatomy import examine
from distill.models.backbone import Backbone, Trunk
from distill.models.batchnorm import set_batchnorm
from distill.models.region_logits.mechanisms import CropHead
from distill.protocols import ModelOutput, Needs, Regions
from distill.regions import pooling_matrix
from tests.distill.models.model_support import PYRAMID, SMALL_PYRAMID, backbone, normalised, spec, stirred

VIT = {"depth": 3, "img_size": 64}
KINDS = [
    # name, image size, arguments, mechanism, form and prefix tokens of the features
    ("mambaout_femto", 64, {}, "pool", "NHWC", 0),
    ("levit_128s", 128, {"img_size": 128}, "pool", "NLC", 0),
    ("vit_wee_patch16_reg1_gap_256", 64, VIT, "pool", "NLC", 1),
    ("efficientvim_m1", 128, {}, "pool", "NCL", 0),
    ("efficientvit_b0", 64, {}, "split", "NCHW", 0),
    ("lowformer_b0", 64, {}, "split", "NCHW", 0),
    ("resnet50_clip", 64, {"img_size": 64}, "crop", "NCHW", 0),
    ("vit_tiny_patch16_224", 64, {**VIT, "global_pool": "map"}, "crop", "NLC", 1),
    ("volo_d1_224", 64, {"img_size": 64}, "crop", "NLC", 1),
    ("vit_tiny_patch16_224", 64, VIT, "token:attend", "NLC", 1),
    ("deit_tiny_distilled_patch16_224", 64, VIT, "token:attend", "NLC", 2),
    ("xcit_nano_12_p16_224", 64, {"img_size": 64}, "token:shift", "NLC", 1),
    ("crossvit_tiny_240", 240, {}, "token:shift", "NLC", 1),
    ("pit_ti_224", 224, {}, "token:shift", "NLC", 1),
]
EVERYTHING = Needs((PYRAMID, SMALL_PYRAMID), (PYRAMID,), (-1,))


@pytest.mark.parametrize(("name", "size", "kwargs", "mechanism", "form", "prefix"), KINDS)
def test_every_kind_is_recognised_and_leaves_the_model_its_own_logits(
    name: str, size: int, kwargs: dict, mechanism: str, form: str, prefix: int
) -> None:
    served = backbone(name, size, EVERYTHING, **kwargs).eval()
    part = served.layout.parts[-1]
    assert (served.mechanism, part.form, part.prefix) == (mechanism, form, prefix)
    assert served.whole_image_difference is not None
    assert served.whole_image_difference < 1e-4
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        output = served(images)
        assert torch.equal(output.logits, served.model(normalised(images)))
    assert torch.equal(output.region_logits[PYRAMID][:, 0], output.logits)
    torch.testing.assert_close(output.region_logits[PYRAMID][:, :5], output.region_logits[SMALL_PYRAMID])
    assert output.feature_map.shape == (2, served.anatomy.facts.stages[-1].channels, *served.grid)
    mean = output.feature_map.float().mean((2, 3))
    torch.testing.assert_close(output.region_features[PYRAMID][:, 0], mean, rtol=1e-4, atol=1e-5)


def test_an_activation_before_the_pool_is_seen_though_the_fresh_maps_values_do_not_reach_its_bend() -> None:
    torch.manual_seed(0)
    model = stirred(timm.create_model("resnet10t", num_classes=10))
    model.global_pool = nn.Sequential(nn.Hardtanh(-4, 4), model.global_pool)
    anatomy = examine(model, spec(64))
    assert anatomy.features.abs().max() < 4
    served = Backbone(model, anatomy, EVERYTHING).eval()
    assert served.mechanism == "split"  # behind the activation; the mean of a map is not what the pool would give of it


@pytest.mark.parametrize(("name", "size", "kwargs", "mechanism", "form", "prefix"), KINDS)
def test_a_training_student_is_not_disturbed_and_learns_from_its_regions(
    name: str, size: int, kwargs: dict, mechanism: str, form: str, prefix: int
) -> None:
    served = backbone(name, size, EVERYTHING, drop_rate=0.2, **kwargs).train()
    plain = copy.deepcopy(served.model)
    images = torch.rand(4, 3, size, size)
    torch.manual_seed(0)
    output = served(images)
    torch.manual_seed(0)
    assert torch.equal(output.logits, plain(normalised(images)))
    for key, value in plain.state_dict().items():
        assert torch.equal(served.model.state_dict()[key], value), key
    output.region_logits[PYRAMID].square().sum().backward()
    silent = [n for n, p in served.model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in served.model.parameters() if p.grad is not None)


def moved_regions(before: ModelOutput, after: ModelOutput) -> list[int]:
    change = (before.region_logits[PYRAMID] - after.region_logits[PYRAMID]).abs().amax((0, 2))
    return (change > 1e-5).nonzero().flatten().tolist()


def noise_on_cell(grid: Tensor, y: int, x: int) -> Tensor:
    moved = grid.clone()
    moved[:, :, y, x] += torch.randn(grid.shape[1], generator=torch.Generator().manual_seed(3))
    return moved


# the image, its last quarter, and cell (3, 2) of 4 x 4
CELL_3_2 = [0, 4, 5 + 3 * 4 + 2]


@pytest.mark.parametrize("name", ["mambaout_femto", "efficientvit_b0", "volo_d1_224"])
def test_noise_on_one_cell_of_the_map_moves_the_regions_around_it_and_no_other(name: str) -> None:
    size = 64 if name == "volo_d1_224" else 128  # a 4 x 4 grid for each
    kwargs = {"img_size": 64} if name == "volo_d1_224" else {}
    served = backbone(name, size, EVERYTHING, **kwargs).eval()
    assert served.grid == (4, 4)
    [part] = served.layout.parts
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = served.model.forward_features(normalised(images))
        moved = part.from_map(noise_on_cell(part.to_map(features), 3, 2), features)
        served.model.forward_features = lambda _: features
        before = served(images)
        served.model.forward_features = lambda _: moved
        assert moved_regions(before, served(images)) == CELL_3_2


def test_attend_reads_of_the_last_blocks_input_only_the_regions_tokens() -> None:
    served = backbone("vit_tiny_patch16_224", 64, EVERYTHING, **VIT).eval()
    images = torch.rand(2, 3, 64, 64)
    model, block = served.model, served.model.blocks[-1]
    with torch.no_grad():
        inner = model.blocks[:-1](model.norm_pre(model._pos_embed(model.patch_embed(normalised(images)))))
        part = served.layout.parts[0]
        moved = part.from_map(noise_on_cell(part.to_map(inner), 3, 2), inner)
        outputs = []
        for tokens in (inner, moved):
            features = model.norm(block(tokens))
            trunk = Trunk(features, part.to_map(features), {}, tokens)
            served._trunk = lambda _, trunk=trunk: trunk
            outputs.append(served(images))
    assert moved_regions(*outputs) == CELL_3_2


def test_attend_on_a_region_is_the_last_block_run_on_that_regions_tokens_filling_the_image() -> None:
    served = backbone("vit_tiny_patch16_224", 64, EVERYTHING, **VIT).eval()
    images = torch.rand(2, 3, 64, 64)
    model = served.model
    with torch.no_grad():
        inner = model.blocks[:-1](model.norm_pre(model._pos_embed(model.patch_embed(normalised(images)))))
        grid = served.layout.parts[0].to_map(inner)
        quarter = grid[:, :, :2, 2:].repeat_interleave(2, 2).repeat_interleave(2, 3)  # each token four times
        tokens = served.layout.parts[0].from_map(quarter, inner)
        expected = model.forward_head(model.norm(model.blocks[-1](tokens)))
        output = served(images)
    torch.testing.assert_close(output.region_logits[PYRAMID][:, 2], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["attend", "shift", "repeat"])
def test_class_token_definitions_are_what_they_say(mode: str) -> None:
    torch.manual_seed(0)
    model = stirred(timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)).eval()
    served = Backbone(model, examine(model, spec(64)), EVERYTHING, class_tokens=mode).eval()
    assert served.mechanism == f"token:{mode}"
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = served(images)
        tokens = model.forward_features(normalised(images))
    rows = pooling_matrix(4, 4, (1, 2, 4), "area").float() @ tokens[:, 1:]
    by_hand = {
        "shift": lambda: model.head(tokens[:, :1] + rows - tokens[:, 1:].mean(1, keepdim=True)),
        "repeat": lambda: output.logits[:, None].expand(-1, 21, -1),
    }
    if mode in by_hand:
        torch.testing.assert_close(output.region_logits[PYRAMID][:, 1:], by_hand[mode]()[:, 1:], rtol=1e-4, atol=1e-5)
    distinct = (output.region_logits[PYRAMID][:, 1:].std(1).amax() > 1e-4).item()
    assert distinct == (mode != "repeat")


def test_the_log_says_which_definition_is_used_and_when_attend_is_not_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backbone("cait_xxs24_224", 64, EVERYTHING, img_size=64)
        backbone("vit_tiny_patch16_224", 64, EVERYTHING, **VIT)
    assert "cait_xxs24_224: class-token definition 'shift' instead of 'attend'" in caplog.text
    assert "cait_xxs24_224 reads class tokens: its regions' logits are defined by 'shift'" in caplog.text
    assert "vit_tiny_patch16_224 reads class tokens: its regions' logits are defined by 'attend'" in caplog.text


def test_an_unknown_class_token_definition_is_refused() -> None:
    model = timm.create_model("cifar_resnet8")
    with pytest.raises(ValueError, match="class_tokens 'mean': no such definition; choose one of attend, shift, repeat"):
        Backbone(model, examine(model, spec(32)), EVERYTHING, class_tokens="mean")


def test_crops_are_the_boxes_of_their_regions() -> None:
    served = backbone("resnet50_clip", 224, Needs((SMALL_PYRAMID,)))
    assert isinstance(served.region_head, CropHead)
    assert served.region_head.shapes == {(4, 4): [(0, 0, 0), (1, 0, 3), (2, 3, 0), (3, 3, 3)]}  # quarters of 7 x 7 overlap


class FlatHead(nn.Module):
    """A classifier whose head is a linear layer on the flattened grid: no region smaller than the image fits it."""

    num_classes = num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.head = nn.Linear(4 * 16, 4)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))

    def forward_intermediates(self, x: Tensor, **_: object) -> tuple[Tensor, list[Tensor]]:
        return self.stem(x), [self.stem(x)]


def test_what_no_mechanism_serves_is_refused_by_name_with_every_reason_and_the_rest_works() -> None:
    model = FlatHead()
    anatomy = examine(model, spec(32), "flat")
    with pytest.raises(ValueError, match=r"flat cannot give region logits \(pool: its head fails .*; crop: .*stages work"):
        Backbone(model, anatomy, Needs((PYRAMID,)))
    served = Backbone(model, anatomy, Needs((), (PYRAMID,), (-1,)))
    assert served(torch.rand(1, 3, 32, 32)).region_features[PYRAMID].shape == (1, 21, 4)


def test_a_region_set_of_the_whole_image_alone_needs_no_second_head_call() -> None:
    whole = Regions(scales=(1,))
    served = backbone("vit_tiny_patch16_224", 64, Needs((whole,)), **VIT).eval()
    output = served(torch.rand(2, 3, 64, 64))
    assert torch.equal(output.region_logits[whole][:, 0], output.logits)
    assert served.plan.through_head == ()


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("vit_tiny_patch16_224", 64, VIT),
        ("efficientvit_b0", 64, {}),
    ],
)
def test_every_mechanism_compiles_whole_and_trains_as_eager(name: str, size: int, kwargs: dict) -> None:
    eager = backbone(name, size, EVERYTHING, **kwargs).train()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    images = torch.rand(3, 3, size, size)
    for module in (eager, compiled):
        output = module(images)
        output.region_logits[PYRAMID].square().mean().backward()
    for (key, mine), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-4 * mine.grad.norm() + 1e-7, key
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, msg=key)


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [("vit_tiny_patch16_224", 64, VIT), ("efficientvit_b0", 64, {})],
)
def test_every_mechanism_runs_under_bfloat16_near_float32(name: str, size: int, kwargs: dict) -> None:
    served = backbone(name, size, EVERYTHING, **kwargs).eval()
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        exact = served(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = served(images)
    assert output.region_features[PYRAMID].dtype == torch.float32
    error = (output.region_logits[PYRAMID].float() - exact.region_logits[PYRAMID]).abs().max()
    assert error < 0.1 * exact.region_logits[PYRAMID].abs().max()


@pytest.mark.parametrize(("name", "kwargs"), [("vit_tiny_patch16_224", VIT), ("efficientvit_b0", {}), ("cifar_resnet8", {})])
def test_activation_checkpointing_gives_the_same_gradients(name: str, kwargs: dict) -> None:
    plain = set_batchnorm(backbone(name, 64, EVERYTHING, **kwargs).train(), "frozen")
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.set_grad_checkpointing(True)
    images = torch.rand(2, 3, 64, 64)
    for module in (plain, checkpointed):
        module(images).region_logits[PYRAMID].square().mean().backward()
    for (key, mine), theirs in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)
