"""Models without a classifier (DINO, MAE, CLIP's image towers): maps and embeddings as of any other, no logits."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from distill.models.backbone import Backbone
from distill.models.build import ProbedModel, create_student, create_teacher, probe, published_without_classifier
from distill.models.input_spec import input_spec_of
from distill.protocols import Needs
from tests.distill.models.model_support import SMALL_PYRAMID, stirred

READABLE = Needs(region_features=(SMALL_PYRAMID,), stages=(-1,), blocks=(0, -1), embedding=True)
VIT = {"img_size": 64, "depth": 2}
SMALL = [
    ("vit_tiny_patch16_224", VIT),
    ("deit_tiny_distilled_patch16_224", VIT),
    ("convnext_atto", {}),
    ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}),
    ("resnet10t", {}),
    ("mobilenetv3_small_050", {}),
    ("levit_128s", {}),
    ("vit_base_patch16_siglip_224", {"img_size": 64, "depth": 1}),
]


def headless(name: str, **kwargs: object) -> ProbedModel:
    torch.manual_seed(0)
    return create_teacher(name, weights="random", num_classes=10, model_kwargs={"num_classes": 0, **kwargs})


@pytest.mark.parametrize(("name", "kwargs"), SMALL)
def test_its_embedding_is_what_the_missing_classifier_would_read_and_its_logits_are_empty(name: str, kwargs: dict) -> None:
    probed = headless(name, **kwargs)
    stirred(probed.model)
    served = probed.backbone(READABLE)
    images = torch.rand(2, 3, served.input_spec.height, served.input_spec.width)
    output = served(images)
    normalised = (images - served.mean) / served.std
    features = probed.model.forward_features(normalised)
    assert torch.equal(output.embedding, probed.model.forward_head(features, pre_logits=True))
    assert torch.equal(output.embedding, probed.model(normalised))
    assert (probed.facts.num_classes, probed.facts.embedding) == (0, output.embedding.shape[1])
    assert output.logits.shape == (2, 0)
    assert output.stages[-1] is output.feature_map
    assert output.feature_map.shape[1:] == probed.facts.stages[-1]
    assert output.region_features[SMALL_PYRAMID].shape == (2, 5, probed.facts.stages[-1].channels)
    assert {index: tuple(each.shape[1:]) for index, each in output.blocks.items()} == {
        index: tuple(probed.facts.blocks[index]) for index in (0, -1)
    }


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_its_maps_and_embedding_are_those_of_the_model_with_its_classifier(name: str) -> None:
    torch.manual_seed(0)
    whole = stirred(timm.create_model(name, num_classes=10))
    without = timm.create_model(name, num_classes=0)
    without.load_state_dict(whole.state_dict(), strict=False)
    needs = Needs(stages=(-1, -2), preactivations=(-1, -2), embedding=True)
    mine, theirs = (
        probe(model, frozen=True, input_spec=input_spec_of(model)).backbone(needs)(torch.ones(1, 3, 64, 64))
        for model in (without, whole)
    )
    assert torch.equal(mine.embedding, theirs.embedding)
    for kind in ("stages", "preactivations"):
        assert all(torch.equal(getattr(mine, kind)[i], getattr(theirs, kind)[i]) for i in (-1, -2))


@pytest.mark.parametrize(
    ("needs", "what"),
    [
        (Needs(logits=True), "logits"),
        (Needs(region_logits=(SMALL_PYRAMID,)), "region logits"),
        (Needs(region_logits=(SMALL_PYRAMID,), head_bias=True), "region logits and the bias of its head"),
    ],
)
def test_what_only_a_classifier_gives_is_refused_by_name_with_what_works(needs: Needs, what: str) -> None:
    why = rf"resnet10t has no classifier \(num_classes 0\) and cannot give {what}; take a loss that reads feature maps"
    with pytest.raises(ValueError, match=why):
        headless("resnet10t").backbone(needs)


def test_a_head_that_gives_no_vector_has_no_embedding_but_its_maps() -> None:
    probed = headless("resnet10t", global_pool="")
    with pytest.raises(ValueError, match=r"gives \[512, 6, 6\] of an image, not one vector; take a loss"):
        probed.backbone(Needs(embedding=True))
    assert probed.facts.embedding == 0
    assert probed.backbone(Needs(stages=(-1,)))(torch.rand(1, 3, 176, 176)).stages[-1].shape == (1, 512, 6, 6)


def test_a_compiled_one_is_one_graph() -> None:
    served = headless("resnet10t").backbone(READABLE)
    images = torch.rand(2, 3, 176, 176)
    wanted = served(images).embedding
    found = torch.compile(served, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(found.embedding, wanted)
    assert found.logits.shape == (2, 0)


class TestWeights:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        """Weights of a ResNet for 7 classes."""
        torch.manual_seed(0)
        save_file(stirred(timm.create_model("resnet10t", num_classes=7)).state_dict(), tmp_path / "seven.safetensors")
        return tmp_path / "seven.safetensors"

    def served(self, weights: Path, **kwargs: object) -> Backbone:
        probed = create_teacher("resnet10t", weights=str(weights), num_classes=10, model_kwargs=kwargs)
        return probed.backbone(Needs(embedding=True))

    def test_weights_of_other_classes_serve_without_their_classifier_when_asked(self, file: Path) -> None:
        with pytest.raises(ValueError, match="weights for 7 classes, the data have 10"):
            self.served(file)
        plain = timm.create_model("resnet10t", num_classes=7, checkpoint_path=str(file)).eval()
        images = torch.rand(2, 3, 176, 176)
        served = self.served(file, num_classes=0)
        wanted = plain.forward_head(plain.forward_features((images - served.mean) / served.std), pre_logits=True)
        assert torch.equal(served(images).embedding, wanted)

    @pytest.mark.parametrize("folder", [False, True])
    def test_weights_without_a_classifier_make_a_teacher_without_one(self, folder: bool, tmp_path: Path) -> None:
        model = timm.create_model("resnet10t", num_classes=0)
        if folder:
            timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        else:
            save_file(model.state_dict(), tmp_path / "model.safetensors")
        served = self.served(tmp_path if folder else tmp_path / "model.safetensors")
        assert served.num_classes == 0
        assert torch.equal(served.model.conv1[0].weight, model.conv1[0].weight)

    def test_published_weights_without_one_are_known_before_they_are_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert published_without_classifier("vit_base_patch14_dinov2")
        assert not published_without_classifier("resnet34.tv_in1k")
        assert not published_without_classifier("cifar_resnet8"), "timm publishes no weights for it"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        # not refused for its classes: it gets as far as the missing connection
        with pytest.raises(ValueError, match="vit_small_patch14_dinov2: timm cannot make it"):
            create_teacher("vit_small_patch14_dinov2", weights="pretrained", num_classes=10)

    def test_a_class_map_has_nothing_to_map(self, tmp_path: Path) -> None:
        (tmp_path / "map.txt").write_text("0\n")
        with pytest.raises(ValueError, match=r"map.txt: the teacher has no classifier, .* no classes to map; leave it out"):
            create_teacher("eva02_tiny_patch14_224", weights="random", num_classes=1, class_map=str(tmp_path / "map.txt"))

    def test_another_number_of_classes_is_no_request_and_a_student_always_has_those_of_the_data(self) -> None:
        with pytest.raises(ValueError, match="num_classes 5, the data have 10; leave it out, or say 0"):
            headless("resnet10t", num_classes=5)
        with pytest.raises(ValueError, match="num_classes of a model that is trained comes from the data"):
            create_student("resnet10t", num_classes=10, model_kwargs={"num_classes": 0})
