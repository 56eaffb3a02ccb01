"""Students and teachers by name, their weights and their export."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from distill.models.backbone import Backbone
from distill.models.build import create_model, create_student, create_teacher, import_models
from distill.models.card import hub_card
from distill.models.export import export_student
from distill.models.input_spec import input_spec_of
from distill.models.weights import load_weights
from distill.protocols import InputSpec, Needs
from tests.distill.models.model_support import PYRAMID, stirred

REGIONS = Needs((PYRAMID,))


def student(name: str, needs: Needs = REGIONS, **kwargs: object) -> Backbone:
    return create_student(name, **{"num_classes": 10, **kwargs}).backbone(needs)


def teacher(name: str, needs: Needs = REGIONS, **kwargs: object) -> Backbone:
    return create_teacher(name, **{"num_classes": 10, "weights": "random", **kwargs}).backbone(needs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", "resnt18: no architecture of timm; did you mean resnet18"),
        ("cifar_resnet9", "did you mean .*cifar_resnet"),
        ("qqqqqqqq", "no architecture of timm; timm.list_models"),
        ("resnet34.tv_in2k", "resnet34 has no weights tagged 'tv_in2k'; its weights are .*resnet34.tv_in1k"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(name: str, message: str) -> None:
    for create in (student, teacher):
        with pytest.raises(ValueError, match=message):
            create(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet34.tv_in1k",
            "weights for 1000 classes, the data have 10; .*, or take it without its classifier by",
        ),
        ("convnext_tiny.in12k", "weights for 11821 classes, the data have 10"),
        ("cifar_resnet8", "timm publishes no weights for it"),
    ],
)
def test_published_weights_for_other_classes_are_refused_before_anything_is_fetched(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher(name, weights="pretrained")


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "hf_hub:nobody/nothing", "test_vit.r160_in1k"])
def test_what_cannot_be_fetched_is_refused_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{name}: timm cannot make it \(.*\); check name, files and connection"):
        teacher(name, weights="pretrained", num_classes=1000)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json: no such file; a model's folder has"),
        ({"num_classes": 10}, "config.json: names no architecture"),
        ({"architecture": "my_unknown_net"}, "my_unknown_net: no architecture of timm; .*--import adds your own"),
        ({"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {}}, "No suitable checkpoints found"),
    ],
)
def test_a_local_folder_that_is_none_is_refused_with_the_reason(
    tmp_path: Path, config: dict[str, object] | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        teacher(f"local-dir:{tmp_path}", weights="pretrained")


def test_the_refusal_names_weights_that_would_fit() -> None:
    with pytest.raises(
        ValueError, match=r"weights for 21841 classes, the data have 1000; take .*tiny_vit_5m_224.dist_in22k_ft_in1k"
    ):
        teacher("tiny_vit_5m_224", weights="pretrained", num_classes=1000)


def test_an_argument_that_the_architecture_does_not_take_is_refused_unless_it_is_zero() -> None:
    with pytest.raises(ValueError, match=r"drop_path_rate 0.1: densenet121 does not take it; leave it out"):
        create_model("densenet121", drop_path_rate=0.1)
    assert create_model("densenet121", drop_path_rate=0.0).num_classes == 1000


def test_arguments_that_make_no_model_are_named() -> None:
    with pytest.raises(ValueError, match=r"test_vit: timm cannot make it \(.*\); check its arguments .*'num_heads': 7"):
        create_model("test_vit", num_heads=7)


def test_the_input_is_that_of_the_instance() -> None:
    ours = input_spec_of(create_model("convnext_tiny.fb_in22k_ft_in1k_384"))
    assert (ours.height, ours.width, ours.crop_fraction, ours.interpolation) == (384, 384, 1.0, "bicubic")
    assert input_spec_of(create_model("mobilenetv3_small_050")) == InputSpec(
        224, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875
    )
    grey = create_model("cifar_resnet8")
    grey.pretrained_cfg = {**grey.pretrained_cfg, "input_size": (1, 32, 32)}
    with pytest.raises(ValueError, match="takes 1 channels; only RGB"):
        input_spec_of(grey)


def test_a_student_takes_the_recipes_image_size_whether_or_not_its_architecture_is_of_fixed_size() -> None:
    free = student("resnet18", image_size=96)
    assert (free.input_spec.height, free.grid) == (96, (3, 3))
    fixed = student("swin_s3_tiny_224", image_size=128)
    assert (fixed.input_spec.width, fixed.grid) == (128, (4, 4))


def test_a_teacher_made_for_another_size_is_fed_that_size() -> None:
    served = teacher("deit_tiny_patch16_224", model_kwargs={"img_size": 64, "depth": 2})
    assert (served.input_spec.height, served.input_spec.width, served.grid) == (64, 64, (4, 4))
    assert served(torch.rand(1, 3, 96, 96)).logits.shape == (1, 10)


def test_a_student_is_in_training_with_timms_drop_rates() -> None:
    model = student("cifar_resnet14", drop_rate=0.2, drop_path_rate=0.3)
    assert model.training
    assert model.model.head.drop.p == 0.2
    assert model.model.stages[-1][-1].drop_path.drop_prob == pytest.approx(0.3)


def test_an_exported_student_gives_the_same_logits_in_plain_timm_and_as_a_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = student("mobilenetv4_conv_small_035", image_size=64)
    stirred(trained.model)
    names = [f"class {i}" for i in range(10)]
    trained.to(memory_format=torch.channels_last)
    export_student(trained.model, tmp_path, input_spec=trained.input_spec, class_names=names, metadata={"top1": 0.5})
    trained.to(memory_format=torch.contiguous_format).eval()
    images = torch.rand(2, 3, 64, 64)
    logits = trained(images).logits
    plain = [
        timm.create_model("mobilenetv4_conv_small_035", checkpoint_path=str(tmp_path / "model.safetensors"), num_classes=10),
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
    ]
    normalised = (images - trained.mean) / trained.std
    for model in plain:
        assert torch.equal(model.eval()(normalised), logits)
    for weights in (str(tmp_path), str(tmp_path / "model.safetensors")):
        again = teacher("mobilenetv4_conv_small_035", weights=weights)
        assert torch.equal(again.model(normalised), logits)
    assert torch.equal(teacher(f"local-dir:{tmp_path}", weights=str(tmp_path))(images).logits, logits)


def test_the_exported_config_says_what_the_student_is_and_nothing_of_foreign_weights(tmp_path: Path) -> None:
    trained = student("resnet18.tv_in1k", image_size=96)
    export_student(trained.model, tmp_path, input_spec=trained.input_spec, class_names=list("abcdefghij"))
    config = json.loads((tmp_path / "config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (config["architecture"], config["num_classes"], cfg["num_classes"]) == ("resnet18", 10, 10)
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ([3, 96, 96], 0.875, "bilinear")
    assert config["label_names"] == list("abcdefghij")
    assert not {"tag", "url", "hf_hub_id", "license", "origin_url", "paper_ids"} & set(cfg)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = teacher("resnet18", weights=str(tmp_path))
    assert again.input_spec == trained.input_spec


def test_class_names_must_be_as_many_as_the_classes(tmp_path: Path) -> None:
    model = create_model("cifar_resnet8", num_classes=3)
    with pytest.raises(ValueError, match="class_names: 2 names for 3 classes"):
        export_student(model, tmp_path, input_spec=input_spec_of(model), class_names=["a", "b"])


def test_the_model_cards_code_runs_and_its_facts_are_those_of_the_run(tmp_path: Path) -> None:
    trained = student("cifar_resnet8")
    metrics = {"teacher": "cifar_resnet20", "top1": 0.5}
    export_student(trained.model, tmp_path, input_spec=trained.input_spec, metadata=metrics)
    card = (tmp_path / "README.md").read_text()
    assert json.dumps(metrics, indent=2) in card
    code = card.split("```python")[1].split("```")[0].replace("FOLDER", str(tmp_path), 1)
    names: dict = {"image": Image.new("RGB", (40, 36))}
    exec(code, names)
    assert names["logits"].shape == (1, 10)


def test_the_card_of_the_hub_names_its_repository_and_what_was_said_of_the_weights(tmp_path: Path) -> None:
    trained = student("cifar_resnet8")
    export_student(trained.model, tmp_path, input_spec=trained.input_spec, card={"base_model": ["timm/resnet34.tv_in1k"]})
    card = ModelCard(str(hub_card(tmp_path, "someone/student", {"license": "apache-2.0", "datasets": "imagenet-1k"})))
    assert 'model = timm.create_model("hf-hub:someone/student", pretrained=True).eval()\n' in card.text
    assert "FOLDER" not in card.text
    said = card.data.to_dict()
    assert (said["license"], said["datasets"], said["base_model"]) == ("apache-2.0", "imagenet-1k", ["timm/resnet34.tv_in1k"])
    assert said["library_name"] == "timm"


MY_MODELS = """
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from distill.models.cifar.resnet import thin

default_cfgs = generate_default_cfgs({"my_resnet26": {"num_classes": 10, "input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5), "interpolation": "bilinear", "crop_pct": 1.0, "classifier": "head.fc", "first_conv": "stem.0"}})

@register_model
def my_resnet26(pretrained=False, **kwargs):
    return build_model_with_cfg(thin(26), "my_resnet26", pretrained, **kwargs)
"""


def test_a_users_own_file_registers_models_that_are_then_served_by_name(tmp_path: Path) -> None:
    file = tmp_path / "my_models.py"
    file.write_text(MY_MODELS)
    import_models(file)
    import_models(file)
    mine = student("my_resnet26")
    assert (mine.mechanism, mine.input_spec.interpolation) == ("pool", "bilinear")
    with pytest.raises(
        ValueError, match=r"^--import .*nothing.py: no such file; give a Python file that registers models .*loss"
    ):
        import_models(tmp_path / "nothing.py")
    with pytest.raises(ValueError, match=r"^--import .*: a folder; give a Python file"):
        import_models(tmp_path)


class TestClassNames:
    """Weights that say the names of their classes are matched with the data's by these: numbers may differ without a word."""

    NAMES = tuple("abcdefghij")
    ORDER = tuple("jabcdefghi")

    @pytest.fixture
    def named(self, tmp_path: Path) -> Path:
        out = tmp_path / "student"
        torch.manual_seed(0)
        model = create_model("cifar_resnet8", num_classes=10)
        export_student(model, out, input_spec=input_spec_of(model), class_names=list(self.NAMES))
        return out

    @pytest.mark.parametrize("make", ["teacher", "student", "local-dir"])
    def test_another_order_is_matched_by_name_and_said(self, make: str, named: Path) -> None:
        def logits(class_names: tuple[str, ...]) -> tuple[torch.Tensor, str]:
            facts = {"num_classes": 10, "class_names": class_names}
            if make == "student":
                probed = create_student("cifar_resnet8", weights=named, **facts)
            elif make == "teacher":
                probed = create_teacher("cifar_resnet8", weights=str(named), **facts)
            else:
                probed = create_teacher(f"local-dir:{named}", weights="pretrained", **facts)
            return probed.model.eval()(images), probed.remark

        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        (own, quiet), (other, said) = logits(self.NAMES), logits(self.ORDER)
        assert quiet == ""
        assert "class 0 is 'a' there, 'j' in the data" in said
        assert "they were matched by their names" in said
        torch.testing.assert_close(other, own[:, [self.NAMES.index(name) for name in self.ORDER]])
        assert not torch.allclose(other, own, atol=1e-3)

    def test_other_names_are_refused_with_the_first_differences_and_the_way_out(self, named: Path) -> None:
        names = ("x", *self.NAMES[1:])
        with pytest.raises(ValueError, match=r"class 0 is 'a' there, 'x' in the data; .* class_map by_number"):
            create_teacher("cifar_resnet8", weights=str(named), num_classes=10, class_names=names)
        with pytest.raises(ValueError, match=r"the file model.safetensors of a student"):
            create_student("cifar_resnet8", weights=named, num_classes=10, class_names=names)
        create_student("cifar_resnet8", weights=named / "model.safetensors", num_classes=10, class_names=names)
        facts = {"weights": str(named), "num_classes": 10}
        taken = create_teacher("cifar_resnet8", class_names=names, class_map="by_number", **facts)
        plain = create_teacher("cifar_resnet8", class_names=self.NAMES, **facts)
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(taken.model(images), plain.model(images))


class TestClassMaps:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        model = stirred(create_model("cifar_resnet8", num_classes=6))
        export_student(model, tmp_path, input_spec=input_spec_of(model))
        return tmp_path

    @pytest.mark.parametrize("file", ["", "model.safetensors"])
    def test_a_teacher_of_other_classes_serves_the_datas_in_their_order(self, folder: Path, file: str) -> None:
        (folder / "map.txt").write_text("4  # first class\n0\n5\n")
        mapped = teacher("cifar_resnet8", weights=str(folder / file), num_classes=3, class_map=str(folder / "map.txt"))
        plain = teacher("cifar_resnet8", weights=str(folder / file), num_classes=6)
        images = torch.rand(2, 3, 32, 32)
        assert mapped.num_classes == 3
        assert torch.equal(mapped(images).logits, plain(images).logits[:, [4, 0, 5]])
        assert torch.equal(mapped.serving(Needs())(images).logits, mapped(images).logits)
        assert torch.equal(mapped(images).region_logits[PYRAMID], plain(images).region_logits[PYRAMID][:, :, [4, 0, 5]])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("4\n0\n", "2 lines, the data have 3 classes"),
            ("4\n0\n6\n", "'6' is no class of the teacher; its classes are 0 to 5"),
            ("4\n-1\n1\n", "'-1' is no class of the teacher"),
        ],
    )
    def test_a_map_that_does_not_fit_is_refused(self, folder: Path, text: str, message: str) -> None:
        (folder / "map.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            teacher("cifar_resnet8", weights=str(folder), num_classes=3, class_map=str(folder / "map.txt"))

    def test_a_missing_map_is_named(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"nothing.txt: no such class map"):
            teacher("cifar_resnet8", weights=str(folder), num_classes=3, class_map=str(folder / "nothing.txt"))


class TestWeightsThatDoNotFit:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = create_model("cifar_resnet8", num_classes=10)
        export_student(model, tmp_path, input_spec=input_spec_of(model))
        return tmp_path

    def test_other_class_count_names_both_numbers(self, folder: Path) -> None:
        for weights in (folder, folder / "model.safetensors"):
            with pytest.raises(ValueError, match="weights for 10 classes, the data have 7"):
                teacher("cifar_resnet8", weights=str(weights), num_classes=7)

    def test_other_architecture_is_named(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="holds a cifar_resnet8, not a cifar_resnet14; name that model, or"):
            teacher("cifar_resnet14", weights=str(folder))
        with pytest.raises(ValueError, match=r"not the weights of a cifar_resnet14; 36 tensors missing"):
            teacher("cifar_resnet14", weights=str(folder / "model.safetensors"))
        with pytest.raises(ValueError, match=r"1 tensors have other shapes than in the cifar_resnet8: stem.0.weight"):
            load_weights(create_model("cifar_resnet8", num_classes=10, in_chans=1), folder)

    def test_missing_and_broken_files_are_named(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"nothing.pth: no such weights"):
            teacher("cifar_resnet8", weights=str(folder / "nothing.pth"))
        (folder / "broken.safetensors").write_bytes(b"not tensors")
        with pytest.raises(ValueError, match=r"broken.safetensors: holds no weights: it starts with"):
            teacher("cifar_resnet8", weights=str(folder / "broken.safetensors"))
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="names no architecture"):
            teacher("cifar_resnet8", weights=str(folder))

    def test_pickled_objects_are_refused(self, folder: Path) -> None:
        file = folder / "pickle.pth"
        torch.save({"state_dict": create_model("cifar_resnet8").state_dict(), "path": Path("x")}, file)
        with pytest.raises(ValueError, match="cannot be read as weights"):
            teacher("cifar_resnet8", weights=str(file))

    def test_plain_pth_of_timms_own_layout_loads(self, folder: Path) -> None:
        model = create_model("cifar_resnet8", num_classes=10)
        torch.save({"state_dict": model.state_dict()}, folder / "last.pth")
        served = teacher("cifar_resnet8", weights=str(folder / "last.pth"))
        assert torch.equal(served.model.head.fc.weight, model.head.fc.weight)
