"""The papers' CIFAR architectures: sizes of the papers' code, interface of timm."""

from __future__ import annotations

import pytest
import timm
import torch

from tests.distill.models.model_support import stirred

# name -> parameters at 100 classes, (channels, side) of each stage at 32 px, channels that the head reads
NETS = {
    "cifar_resnet8": (83_892, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet14": (181_108, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet20": (278_324, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet32": (472_756, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet44": (667_188, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet56": (861_620, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet110": (1_736_564, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_resnet8x4": (1_233_540, [(64, 32), (128, 16), (256, 8)], 256),
    "cifar_resnet32x4": (7_433_860, [(64, 32), (128, 16), (256, 8)], 256),
    "cifar_wrn_16_1": (180_916, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_wrn_40_1": (569_780, [(16, 32), (32, 16), (64, 8)], 64),
    "cifar_wrn_16_2": (703_284, [(32, 32), (64, 16), (128, 8)], 128),
    "cifar_wrn_40_2": (2_255_156, [(32, 32), (64, 16), (128, 8)], 128),
    "cifar_vgg8": (3_965_028, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_vgg11": (9_277_284, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_vgg13": (9_462_180, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_vgg16": (14_774_436, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_vgg19": (20_086_692, [(128, 16), (256, 8), (512, 4), (512, 4)], 512),
    "cifar_mobilenetv2_050": (812_836, [(12, 16), (16, 8), (48, 4), (160, 2)], 1280),
    "cifar_shufflenetv1": (949_258, [(240, 16), (480, 8), (960, 4)], 960),
    "cifar_shufflenetv2": (1_355_528, [(116, 16), (232, 8), (464, 4)], 1024),
    "cifar_resnet18": (11_220_132, [(64, 32), (128, 16), (256, 8), (512, 4)], 512),
    "cifar_resnet34": (21_328_292, [(64, 32), (128, 16), (256, 8), (512, 4)], 512),
    "cifar_resnet50": (23_705_252, [(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048),
}


@pytest.mark.parametrize("name", NETS)
def test_parameters_and_maps_are_those_of_the_papers(name: str) -> None:
    parameters, maps, head_width = NETS[name]
    model = timm.create_model(name).eval()
    assert model.num_classes == 100
    assert sum(p.numel() for p in model.parameters()) == parameters
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        final, intermediates = model.forward_intermediates(images, output_fmt="NCHW")
        assert [tuple(m.shape) for m in intermediates] == [(2, c, side, side) for c, side in maps]
        assert [info["num_chs"] for info in model.feature_info] == [c for c, _ in maps]
        assert [info["reduction"] for info in model.feature_info] == [32 // side for _, side in maps]
        assert final.shape[1] == model.num_features == head_width
        assert torch.equal(final, model.forward_features(images))
        assert torch.equal(model(images), model.forward_head(final))


ONE_OF_EACH = [
    "cifar_resnet8",
    "cifar_wrn_16_1",
    "cifar_vgg8",
    "cifar_mobilenetv2_050",
    "cifar_shufflenetv1",
    "cifar_shufflenetv2",
]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_timms_interface_is_complete(name: str) -> None:
    model = timm.create_model(name, num_classes=7, in_chans=3, drop_rate=0.1)
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 7)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == 7
    [first] = model.forward_intermediates(images, indices=[0], intermediates_only=True, stop_early=True)
    assert first.shape[1] == model.feature_info[0]["num_chs"]
    model.reset_classifier(5)
    assert model(images).shape == (2, 5)
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"], cfg["mean"]) == ((3, 32, 32), 1.0, (0.5071, 0.4867, 0.4408))
    features = timm.create_model(name, features_only=True)(images)
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in model.feature_info]
    with pytest.raises(ValueError, match="output_fmt 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize(
    ("name", "channels", "side"),
    [
        ("cifar_resnet8x4_224", 256, 28),
        ("cifar_vgg8_224", 512, 28),
        ("cifar_shufflenetv1_224", 960, 14),
        ("cifar_mobilenetv2_050_224", 1280, 7),
    ],
)
def test_the_variants_for_224_px_have_a_7x7_stem_and_the_papers_maps(name: str, channels: int, side: int) -> None:
    model = timm.create_model(name).eval()
    assert (model.stem[0].kernel_size, model.stem[0].stride[0] >= 2, model.num_classes) == ((7, 7), True, 200)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    with torch.no_grad():
        final, maps = model.forward_intermediates(torch.randn(1, 3, 224, 224))
    assert tuple(final.shape) == (1, channels, side, side)
    assert [224 // m.shape[2] for m in maps] == [info["reduction"] for info in model.feature_info]


def test_a_stages_map_is_not_overwritten_by_what_runs_after_it() -> None:
    for name in ONE_OF_EACH:
        model = stirred(timm.create_model(name)).eval()
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            _, maps = model.forward_intermediates(images)
            for index, seen in enumerate(maps):
                alone = model.forward_intermediates(images, indices=[index], intermediates_only=True, stop_early=True)[0]
                assert torch.equal(seen, alone), (name, index)


def test_shuffling_reads_channels_group_by_group() -> None:
    from distill.models.cifar.shufflenet import shuffled

    assert shuffled(torch.arange(6).reshape(1, 6, 1, 1), 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = stirred(timm.create_model("cifar_resnet14")).train()
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_depths_that_do_not_exist_are_refused() -> None:
    from distill.models.cifar.resnet import thin
    from distill.models.cifar.wrn import wide_resnet

    with pytest.raises(ValueError, match=r"depth 21: .* 6n \+ 2"):
        thin(21)
    with pytest.raises(ValueError, match=r"depth 18: .* 6n \+ 4"):
        wide_resnet(18, 1)
