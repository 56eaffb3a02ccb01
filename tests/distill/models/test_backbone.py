"""`Backbone` against the plain timm model it wraps."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from distill.models.anatomy import examine
from distill.models.backbone import Backbone
from distill.models.batchnorm import set_batchnorm
from distill.models.region_logits.head_batchnorm import FEW_ROWS
from distill.protocols import Needs, Regions
from distill.regions import region_matrix
from tests.distill.models.model_support import PYRAMID, SMALL_PYRAMID, backbone, normalised, spec, stirred

FAMILIES = [
    "resnet18",
    "resnetv2_50",
    "mobilenetv1_100",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "efficientnet_b0",
    "convnext_atto",
    "regnetx_002",
    "densenet121",
    "repvgg_a0",
    "ghostnet_050",
]
EVERYTHING = Needs((PYRAMID, SMALL_PYRAMID), (PYRAMID,), (-1, -2))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_the_models_own_and_regions_are_its_head_on_pooled_regions(name: str) -> None:
    served = backbone(name, 64, EVERYTHING).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        output = served(images)
        assert torch.equal(output.logits, served.model(normalised(images)))
        assert torch.equal(output.region_logits[PYRAMID][:, 0], output.logits)
        assert torch.equal(output.region_logits[PYRAMID][:, :5], output.region_logits[SMALL_PYRAMID])
        features = served.model.forward_features(normalised(images))
        assert torch.equal(output.feature_map, features)
        corner = features[:, :, :1, :1]  # at 64 px these nets end at 2x2: a quarter is one cell
        torch.testing.assert_close(
            output.region_logits[SMALL_PYRAMID][:, 1], served.model.forward_head(corner), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(output.region_features[PYRAMID][:, 0], features.mean((2, 3)))
    assert output.stages[-1] is output.feature_map
    assert output.stages[-2].shape[:3] == (2, served.anatomy.facts.stages[-2].channels, 4)


def test_noise_outside_a_region_leaves_its_logits_alone_and_noise_inside_moves_them() -> None:
    served = backbone("convnext_atto", 128, Needs((PYRAMID,))).eval()
    features = torch.randn(2, 320, 4, 4)
    served.model.forward_features = lambda images: features  # the trunk mixes places; the promise is about the map
    with torch.no_grad():
        before = served(torch.rand(2, 3, 128, 128)).region_logits[PYRAMID]
        features[:, :, 3, 2] += torch.randn(320)
        after = served(torch.rand(2, 3, 128, 128)).region_logits[PYRAMID]
    moved = (before - after).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == [0, 4, 5 + 3 * 4 + 2]  # the image, its last quarter, that one cell


def test_rows_that_coincide_are_pooled_once_and_the_cascade_keeps_its_own_global_region() -> None:
    served = backbone("cifar_resnet8", 32, Needs((PYRAMID, SMALL_PYRAMID, Regions((2,)))))
    assert served.region_matrix.shape == (20, 64)
    cascade = Regions((1, 2), mode="cascade")
    own = backbone("cifar_resnet8", 32, Needs((cascade,)))
    assert own.plan.logits[cascade] == (1, 2, 3, 4, 5)


def test_building_leaves_the_model_and_the_random_numbers_as_they_were() -> None:
    model = stirred(timm.create_model("mobilenetv4_conv_small_035", num_classes=10)).train()
    before, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Backbone(model, examine(model, spec(64)), EVERYTHING)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small_035", "repvit_m0_9"])
def test_batchnorm_in_a_training_head_keeps_the_statistics_of_plain_training(name: str) -> None:
    served = backbone(name, 64, EVERYTHING, drop_rate=0.3).train()
    assert served.head_norms
    plain = copy.deepcopy(served.model)
    for step in range(3):
        images = torch.rand(4, 3, 64, 64)
        torch.manual_seed(step)
        output = served(images)
        torch.manual_seed(step)
        assert torch.equal(output.logits, plain(normalised(images)))  # one dropout mask, the plain one
    for key, value in plain.state_dict().items():
        assert torch.equal(served.model.state_dict()[key], value), key


@pytest.mark.parametrize("batch", [FEW_ROWS - 2, FEW_ROWS + 2])
def test_regions_in_training_are_normalised_by_the_images_own_statistics_where_there_are_enough(batch: int) -> None:
    served = backbone("repvit_m0_9", 64, Needs((SMALL_PYRAMID,))).train()
    output = served(torch.rand(batch, 3, 64, 64))
    mean_of_quarters = output.region_logits[SMALL_PYRAMID][:, 1:].mean(1)
    same = torch.allclose(mean_of_quarters, output.logits, rtol=1e-3, atol=1e-3)  # its head is BatchNorm, then linear
    assert same == (batch >= FEW_ROWS)


def test_region_logits_train_trunk_and_head() -> None:
    served = backbone("mobilenetv4_conv_small_035", 64, Needs((SMALL_PYRAMID,))).train()
    served(torch.rand(4, 3, 64, 64)).region_logits[SMALL_PYRAMID][:, 1:].square().sum().backward()
    silent = [name for name, p in served.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []
    assert served.model.conv_stem.weight.grad.abs().sum() > 0
    assert served.model.classifier.weight.grad.abs().sum() > 0


def test_copies_of_the_model_carry_no_trace_of_the_backbone() -> None:
    served = backbone("resnet18", 64, EVERYTHING)
    served(torch.rand(2, 3, 64, 64))
    plain = timm.create_model("resnet18", num_classes=10)
    assert list(copy.deepcopy(served.model).state_dict()) == list(plain.state_dict())
    assert all(key.startswith("model.") for key in served.state_dict())


def test_a_frozen_teacher_stays_in_evaluation_and_takes_no_gradient() -> None:
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet8", num_classes=10)
    teacher = Backbone(model, examine(model, spec(32)), Needs(), frozen=True)
    nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_frozen_batchnorm_stays_frozen_through_train() -> None:
    served = set_batchnorm(backbone("mobilenetv4_conv_small_035", 64, EVERYTHING).train(), "frozen")
    before = {k: v.clone() for k, v in served.model.state_dict().items() if "running" in k}
    served.train()(torch.rand(4, 3, 64, 64)).logits.sum().backward()
    assert all(torch.equal(served.model.state_dict()[key], value) for key, value in before.items())
    assert served.model.norm_head.weight.grad is None
    assert served.model.training


def test_bad_batchnorm_modes_are_refused() -> None:
    served = backbone("cifar_resnet8", 32, Needs())
    with pytest.raises(ValueError, match="batchnorm 'global': not a mode; choose one of local, sync, frozen"):
        set_batchnorm(served, "global")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="on GPUs only"):
            set_batchnorm(served, "sync")


def test_images_of_another_size_are_resized_with_antialiasing() -> None:
    served = backbone("cifar_resnet8", 32, Needs()).eval()
    images = torch.rand(2, 3, 48, 64)
    small = nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(served(images).logits, served.model(normalised(small)))
    aliased = nn.functional.interpolate(images, (32, 32), mode="bicubic").clamp(0, 1)
    assert not torch.allclose(served(images).logits, served.model(normalised(aliased)))


def test_channels_last_gives_the_same_numbers_and_a_channels_last_map() -> None:
    served = backbone("resnet18", 64, EVERYTHING).eval()
    images = torch.rand(2, 3, 64, 64)
    before = served(images)
    served.to(memory_format=torch.channels_last)
    after = served(images.contiguous(memory_format=torch.channels_last))
    assert after.feature_map.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after.region_logits[PYRAMID], before.region_logits[PYRAMID], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv4_conv_small_035"])
def test_autocast_pools_in_float32_and_stays_near_float32(name: str) -> None:
    served = backbone(name, 64, EVERYTHING).eval()
    images = torch.rand(2, 3, 64, 64)
    exact = served(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = served(images)
        assert torch.equal(output.logits, served.model(normalised(images)))
    assert output.region_features[PYRAMID].dtype == torch.float32
    pooled = torch.einsum("rl,bcl->brc", region_matrix(*served.grid, PYRAMID).float(), output.feature_map.float().flatten(2))
    torch.testing.assert_close(output.region_features[PYRAMID], pooled, rtol=1e-5, atol=1e-5)
    error = (output.region_logits[PYRAMID].float() - exact.region_logits[PYRAMID]).abs().max()
    assert error < 0.1 * exact.region_logits[PYRAMID].abs().max()


def test_needs_of_logits_alone_compute_nothing_else() -> None:
    served = backbone("resnet18", 64, Needs())
    output = served(torch.rand(1, 3, 64, 64))
    assert (dict(output.region_logits), dict(output.region_features), dict(output.stages)) == ({}, {}, {})
    assert served.mechanism == "none"


def test_a_stage_that_is_not_there_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match="stage -4: cifar_resnet8 has 3 stages; ask for -1 to -3"):
        backbone("cifar_resnet8", 32, Needs(stages=(-4,)))


def test_a_student_that_drops_tokens_in_training_is_refused() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=1, img_size=64, patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"patch_drop_rate 0.5: vit drops tokens in training"):
        Backbone(model, examine(model, spec(64), "vit"), Needs())
    assert Backbone(model, examine(model, spec(64)), Needs(), frozen=True).grid == (4, 4)


def test_a_compiled_training_step_equals_the_eager_one() -> None:
    eager = backbone("mobilenetv4_conv_small_035", 64, EVERYTHING).train()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    images = torch.rand(4, 3, 64, 64)
    for module in (eager, compiled):
        output = module(images)
        (output.region_logits[PYRAMID].square().mean() + output.stages[-2].mean()).backward()
    for (name, mine), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, msg=key)
