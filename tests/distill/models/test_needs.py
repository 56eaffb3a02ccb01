"""What a backbone gives beside logits, regions and stages: embeddings, raw blocks, pre-activations and the head's bias."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from distill.models.anatomy import examine
from distill.models.backbone import Backbone
from distill.models.batchnorm import set_batchnorm
from distill.models.describe import probed_with_noise
from distill.protocols import Needs, Regions
from tests.distill.models.model_support import PYRAMID, SMALL_PYRAMID, backbone, normalised, spec, stirred

VIT = {"depth": 3, "img_size": 64}
STAGES = (-1, -2, -3)
NARROW = {"mlp_ratio": 0.0625}
"""VGG with a sixteenth of its head, which has nine tenths of its 133 million parameters."""


def affine_of(model: nn.Module, name: str) -> list[torch.Tensor]:
    norm = model.get_submodule(name)
    return [norm.weight, norm.bias]


class TestEmbedding:
    @pytest.mark.parametrize(
        ("name", "size", "kwargs", "width"),
        [
            ("resnet18", 64, {}, 512),
            ("mobilenetv3_small_050", 64, {}, 1024),
            ("vgg11_bn", 64, NARROW, 4096),
            ("cifar_wrn_16_2", 32, {}, 128),
            ("vit_tiny_patch16_224", 64, VIT, 192),
            ("efficientvit_b0", 64, {}, 1280),
        ],
    )
    @pytest.mark.parametrize("regions", [(), (SMALL_PYRAMID,)])
    def test_it_is_what_the_last_linear_layer_reads_in_one_run_of_the_head(
        self, name: str, size: int, kwargs: dict, width: int, regions: tuple[Regions, ...]
    ) -> None:
        served = backbone(name, size, Needs(regions, embedding=True), drop_rate=0.5, **kwargs).train()
        assert served.anatomy.facts.embedding == width
        plain = copy.deepcopy(served.model)
        images = torch.rand(4, 3, size, size)
        torch.manual_seed(1)
        output = served(images)
        torch.manual_seed(1)
        assert torch.equal(output.logits, plain(normalised(images)))  # one dropout mask: the head did not run twice
        assert output.embedding.shape == (4, width)
        layer = served.model.get_submodule(served.anatomy.classifier.name)
        read = output.embedding if isinstance(layer, nn.Linear) else output.embedding[:, :, None, None]
        assert torch.equal(layer(read).flatten(1), output.logits)
        output.embedding.square().sum().backward()
        first = next(p for n, p in served.model.named_parameters() if p.ndim == 4)
        assert first.grad.abs().sum() > 0
        assert layer.weight.grad is None

    @pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "levit_128s"])
    def test_a_head_of_two_linear_layers_has_none_and_is_refused_by_name(self, name: str) -> None:
        size = 64 if name.startswith("deit") else 128
        kwargs = VIT if name.startswith("deit") else {"img_size": 128}
        with pytest.raises(ValueError, match=f"{name} cannot give an embedding: no single linear layer gives its logits"):
            backbone(name, size, Needs(embedding=True), **kwargs)
        assert backbone(name, size, Needs(), **kwargs).anatomy.facts.embedding == 0

    def test_a_convolution_of_one_cell_is_a_classifier_too(self) -> None:
        served = backbone("resnetv2_50x1_bit", 64, Needs(embedding=True)).eval()  # BiT
        layer = served.model.get_submodule(served.anatomy.classifier.name)
        assert isinstance(layer, nn.Conv2d)
        output = served(torch.rand(2, 3, 64, 64))
        torch.testing.assert_close(output.embedding @ layer.weight.flatten(1).T + layer.bias, output.logits)


class TestBlocks:
    @pytest.mark.parametrize(
        ("name", "size", "kwargs", "blocks"),
        [
            ("resnet18", 64, {}, (0, 3, -1)),
            ("cifar_vgg8", 32, {}, (2, 3, -4)),  # blocks 2 and 3 have one resolution: as stages they are one
            ("vit_tiny_patch16_224", 64, VIT, (0, -1, -2)),
        ],
    )
    @pytest.mark.parametrize("regions", [(), (SMALL_PYRAMID,)])
    def test_they_are_the_maps_of_forward_intermediates_by_its_own_index(
        self, name: str, size: int, kwargs: dict, blocks: tuple[int, ...], regions: tuple[Regions, ...]
    ) -> None:
        served = backbone(name, size, Needs(regions, blocks=blocks, stages=(-1,)), **kwargs).eval()
        images = torch.rand(2, 3, size, size)
        output = served(images)
        maps = served.model.forward_intermediates(normalised(images), intermediates_only=True, output_fmt="NCHW")
        assert list(output.blocks) == list(blocks)
        shapes = served.anatomy.facts.blocks
        assert len(shapes) == len(maps)
        for block in blocks:
            assert torch.equal(output.blocks[block], maps[block])
            assert output.blocks[block].shape[1:] == tuple(shapes[block])
        assert torch.equal(output.logits, served.model(normalised(images)))
        served.train()(images).blocks[blocks[0]].sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in served.model.parameters())

    @pytest.mark.parametrize("block", [3, -4])
    def test_a_block_that_is_not_there_is_refused_with_the_range(self, block: int) -> None:
        with pytest.raises(ValueError, match=f"block {block}: cifar_resnet8 has 3 blocks; ask for 0 to 2, or -1 to -3"):
            backbone("cifar_resnet8", 32, Needs(blocks=(block,)))


class TestPreactivations:
    """The names of the normalisation layers are where the published code takes them, see OFD and ReviewKD."""

    @pytest.mark.parametrize(
        ("name", "size", "norms"),
        [
            ("resnet18", 64, ("layer4.1.bn2", "layer3.1.bn2", "layer2.1.bn2")),
            ("resnet50", 64, ("layer4.2.bn3", "layer3.5.bn3", "layer2.3.bn3")),
            ("regnety_002", 64, ("s4.b7.conv3.bn", "s3.b4.conv3.bn", "s2.b1.conv3.bn")),  # s2 has a shortcut called later
            ("mobilenetv1_100", 64, ("blocks.4.1.bn2", "blocks.3.5.bn2", "blocks.2.1.bn2")),
            ("vgg11_bn", 64, ("features.26", "features.26", "features.19")),  # the last map is behind a max pooling
            ("cifar_resnet8", 32, ("stages.2.0.bn2", "stages.1.0.bn2", "stages.0.0.bn2")),
            ("cifar_resnet50", 32, ("stages.3.2.bn3", "stages.2.5.bn3", "stages.1.3.bn3")),
            ("cifar_vgg13", 32, ("stages.3.4", "stages.1.5", "stages.0.5")),
            ("cifar_shufflenetv1", 32, ("stages.2.3.expand.1", "stages.1.7.expand.1", "stages.0.3.expand.1")),
            ("cifar_shufflenetv2", 32, ("tail.1", None, None)),  # half of each map skips the last BatchNorm
            ("repvgg_a0", 64, ("", "", "")),
        ],
    )
    def test_the_activation_of_them_is_the_stages_map(self, name: str, size: int, norms: tuple[str | None, ...]) -> None:
        narrow = NARROW if name == "vgg11_bn" else {}
        served = backbone(name, size, Needs(stages=STAGES, preactivations=STAGES), **narrow).train()
        plain = copy.deepcopy(served.model)
        images = torch.rand(4, 3, size, size)
        output = served(images)
        assert torch.equal(output.logits, plain(normalised(images)))
        for key, value in plain.state_dict().items():
            assert torch.equal(served.model.state_dict()[key], value), key  # BatchNorm has counted one batch
        for stage, norm in zip(STAGES, norms, strict=True):
            assert torch.equal(output.preactivations[stage].clamp_min(0), output.stages[stage])
            assert output.preactivations[stage].min() < 0
            found = served.anatomy.facts.preactivation_norms[stage]
            assert (found is None) == (not norm)
            if norm:
                assert all(torch.equal(a, b) for a, b in zip(found, affine_of(served.model, norm), strict=True))
        sum(each.square().mean() for each in output.preactivations.values()).backward()
        assert all(p.grad.isfinite().all() for p in served.model.parameters() if p.grad is not None)
        assert next(iter(served.model.parameters())).grad.abs().sum() > 0

    def test_of_a_pre_activation_net_they_are_what_the_next_batchnorm_gives(self) -> None:
        served = backbone("cifar_wrn_16_2", 32, Needs(stages=STAGES, preactivations=STAGES)).train()
        statistics = copy.deepcopy(served.model.stages[1][0].bn1)
        output = served(torch.rand(4, 3, 32, 32))
        torch.testing.assert_close(output.preactivations[-3], statistics(output.stages[-3]))
        assert served.model.stages[1][0].bn1.num_batches_tracked == 1  # the published code runs it twice
        assert torch.equal(output.preactivations[-1].relu(), output.stages[-1])
        for stage, norm in zip(STAGES, ("tail.0", "stages.2.0.bn1", "stages.1.0.bn1"), strict=True):
            found = served.anatomy.facts.preactivation_norms[stage]
            assert torch.equal(found.weight, affine_of(served.model, norm)[0])
        served = backbone("resnetv2_18", 64, Needs(preactivations=(-2,)))
        assert served.taps[-2].name == "stages.3.blocks.0.norm1.act"

    @pytest.mark.parametrize(
        ("name", "size", "kwargs", "stages"),
        [
            ("cifar_mobilenetv2_050", 32, {}, (-2, -3)),
            ("mobilenetv2_050", 64, {}, (-2, -3)),
            ("convnext_atto", 64, {}, STAGES),
            ("vit_tiny_patch16_224", 64, VIT, (-1,)),
            ("swin_s3_tiny_224", 64, {"img_size": 64}, STAGES),
        ],
    )
    def test_where_no_activation_ends_a_stage_they_are_its_map_and_nothing_is_copied(
        self, name: str, size: int, kwargs: dict, stages: tuple[int, ...]
    ) -> None:
        served = backbone(name, size, Needs(stages=stages, preactivations=stages), **kwargs).train()
        output = served(torch.rand(4, 3, size, size))
        assert served.taps == {}
        for stage in stages:
            assert output.preactivations[stage] is output.stages[stage]

    def test_a_linear_bottlenecks_map_comes_from_its_last_batchnorm(self) -> None:
        served = backbone("cifar_mobilenetv2_050", 32, Needs())
        found = served.anatomy.facts.preactivation_norms[-2]
        assert torch.equal(found.bias, affine_of(served.model, "stages.2.6.layers.7")[1])
        assert backbone("convnext_atto", 64, Needs()).anatomy.facts.preactivation_norms == (None,) * 4

    def test_a_stage_that_ends_in_no_module_for_its_activation_is_refused(self) -> None:
        needs = Needs(preactivations=(-2,))
        with pytest.raises(
            ValueError, match=r"inception_v3 cannot give the pre-activation of stage -2: its map is nowhere neg"
        ):
            backbone("inception_v3", 128, needs)

    def test_an_activation_used_twice_is_refused(self) -> None:
        class Twice(nn.Module):
            num_classes = num_features = 4

            def __init__(self) -> None:
                super().__init__()
                self.first, self.second, self.act = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 2, 2), nn.ReLU()
                self.fc = nn.Linear(4, 4)

            def forward_intermediates(self, x, indices=None, **_):
                maps = [self.act(self.first(x))]
                maps.append(self.act(self.second(maps[0])))
                return maps[-1], [maps[i] for i in (range(2) if indices is None else indices)]

            def forward_features(self, x):
                return self.act(self.second(self.act(self.first(x))))

            def forward_head(self, x):
                return self.fc(x.mean((2, 3)))

        model = Twice()
        anatomy = examine(model, spec(32), "twice")
        with pytest.raises(ValueError, match="twice cannot give the pre-activation of stage -2: its activation act is used"):
            Backbone(model, anatomy, Needs(preactivations=(-2,)))
        served = Backbone(model, anatomy, Needs(preactivations=(-1,), stages=(-1,)))
        output = served(torch.rand(2, 3, 32, 32))
        assert torch.equal(output.preactivations[-1].relu(), output.stages[-1])


class TestHeadBias:
    @pytest.mark.parametrize(
        ("name", "size", "kwargs"),
        [
            ("resnet18", 64, {}),
            ("cifar_wrn_16_2", 32, {}),
            ("swin_s3_tiny_224", 64, {"img_size": 64}),
            ("mixer_s32_224", 64, {"img_size": 64}),
        ],
    )
    def test_without_it_region_logits_average_to_the_logits_and_scale_with_the_map(
        self, name: str, size: int, kwargs: dict
    ) -> None:
        quarters = Regions((2,))
        served = backbone(name, size, Needs((quarters,), head_bias=True), drop_rate=0.2, **kwargs)
        output = served.train()(torch.rand(4, 3, size, size))
        assert output.head_bias.shape == (10,)
        torch.testing.assert_close(output.head_bias, served.model.get_submodule(served.anatomy.classifier.name).bias)
        output.head_bias.sum().backward()
        output = served.eval()(torch.rand(4, 3, size, size))
        maps = output.region_logits[quarters] - output.head_bias  # class activation maps, pooled
        torch.testing.assert_close(maps.mean(1) + output.head_bias, output.logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("name", "size", "kwargs", "why"),
        [
            ("convnext_atto", 64, {}, "no affine function of the map's mean"),
            ("mobilenetv3_small_050", 64, {}, "no affine function of the map's mean"),
            ("vgg11_bn", 64, NARROW, "reads more than the mean of the map"),
            ("vit_tiny_patch16_224", 64, VIT, "reads more than the mean of the map"),
            ("repvit_m0_9", 64, {}, "has BatchNorm, which is not affine in training"),
        ],
    )
    def test_heads_that_are_not_affine_in_the_maps_mean_are_refused_by_name(
        self, name: str, size: int, kwargs: dict, why: str
    ) -> None:
        with pytest.raises(ValueError, match=f"{name} cannot give the bias of its head: .*{why}; take a loss"):
            backbone(name, size, Needs(head_bias=True), **kwargs)

    def test_an_activation_in_the_head_is_seen_whatever_the_size_of_the_maps_values(self) -> None:
        """Noise on the norms makes them 1e5 and larger here, where a hard swish is one straight line."""
        torch.manual_seed(0)
        name = "mobilenetv3_large_100"
        with probed_with_noise(timm.create_model(name, num_classes=10), name=name) as probed:
            assert probed.anatomy.features.abs().max() > 1e5
            with pytest.raises(ValueError, match="its logits are no affine function of the map's mean"):
                probed.backbone(Needs(head_bias=True))

    def test_a_teachers_batchnorm_is_affine(self) -> None:
        torch.manual_seed(0)
        model = stirred(timm.create_model("repvit_m0_9", num_classes=10))
        teacher = Backbone(model, examine(model, spec(64)), Needs((PYRAMID,), head_bias=True), frozen=True)
        output = teacher(torch.rand(2, 3, 64, 64))
        maps = output.region_logits[PYRAMID][:, 1:5] - output.head_bias
        torch.testing.assert_close(maps.mean(1) + output.head_bias, output.logits, rtol=1e-3, atol=1e-3)


EVERYTHING = Needs((SMALL_PYRAMID,), (SMALL_PYRAMID,), (-1,), (-1, -2), (0, -1), embedding=True, head_bias=True)


def test_who_asks_for_nothing_gets_nothing_and_no_tap_stands_anywhere() -> None:
    served = backbone("cifar_resnet8", 32, Needs())
    output = served(torch.rand(2, 3, 32, 32))
    assert (served.taps, served.head_taps, served.map_indices) == ({}, [], [])
    assert (output.preactivations, output.blocks, output.embedding, output.head_bias) == ({}, {}, None, None)
    everything = served.serving(EVERYTHING)
    plain = [type(module) for module in served.model.modules()]
    everything(torch.rand(2, 3, 32, 32))
    assert [type(module) for module in served.model.modules()] == plain
    assert all(tap.kept is None for tap in (*everything.taps.values(), *everything.head_taps))


def test_the_model_is_whole_again_after_a_forward_pass_that_fails() -> None:
    served = backbone("cifar_resnet8", 32, EVERYTHING)
    plain = [type(module) for module in served.model.modules()]
    with pytest.raises(RuntimeError):
        served(torch.rand(2, 5, 32, 32))
    assert [type(module) for module in served.model.modules()] == plain


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_2"])
def test_all_of_it_compiles_whole_and_trains_as_eager(name: str) -> None:
    eager = backbone(name, 32, EVERYTHING).train()
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    images = torch.rand(4, 3, 32, 32)
    for module in (eager, compiled):
        output = module(images)
        parts = [*output.preactivations.values(), *output.blocks.values(), output.embedding, output.head_bias]
        sum(part.square().mean() for part in parts).backward()
    for (key, mine), theirs in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain = set_batchnorm(backbone("cifar_resnet8", 32, EVERYTHING).train(), "frozen")
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.set_grad_checkpointing(True)
    images = torch.rand(4, 3, 32, 32)
    for module in (plain, checkpointed):
        output = module(images)
        (output.preactivations[-2].square().mean() + output.embedding.sum()).backward()
    for (key, mine), theirs in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=key)
