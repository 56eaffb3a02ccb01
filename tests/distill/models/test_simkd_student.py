"""SimKD's student is one timm model: body, projector and the teacher's classifier, exported and loaded as any other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch

import distill.models  # noqa: F401  (registers it)
from distill.losses.simkd import SimKD, simkd_loss
from distill.models.anatomy import examine
from distill.models.backbone import Backbone
from distill.models.export import export_student
from distill.models.simkd import SimKDStudent, build_simkd_student, projector
from distill.optim import parameter_groups
from distill.protocols import MapShape, ModelFacts, ModelOutput, Needs, Target
from tests.distill.models.model_support import PYRAMID, spec, stirred

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGET = Target(torch.zeros(3, dtype=torch.int64))


def teacher(name: str = "cifar_resnet8x4", **options) -> torch.nn.Module:
    """A teacher whose BatchNorms and classifier are not those of a fresh net."""
    torch.manual_seed(1)
    return stirred(timm.create_model(name, num_classes=7, **options)).eval()


def built(body: str, of: torch.nn.Module, **options) -> SimKDStudent:
    """The student of this body, not as fresh nets are."""
    torch.manual_seed(2)
    plain = timm.create_model(body, num_classes=7)
    return stirred(build_simkd_student(plain, of, teacher_images=IMAGES, student_images=IMAGES, **options)).eval()


def test_the_teachers_classifier_is_in_it_and_is_frozen():
    of = teacher()
    plain = timm.create_model("cifar_resnet8", num_classes=7, drop_path_rate=0.1)
    student = build_simkd_student(plain, of, teacher_images=IMAGES, student_images=IMAGES)
    body = plain.state_dict()
    assert all(torch.equal(value, body[name]) for name, value in student.body.state_dict().items())
    assert student.body.stages[-1][-1].drop_path.drop_prob > 0
    for name, value in of.get_classifier().state_dict().items():
        assert torch.equal(student.get_classifier().state_dict()[name], value)
    trained = {id(p) for group in parameter_groups(student, 1e-4, True) for p in group["params"]}
    assert not trained & {id(p) for p in student.head.parameters()}
    assert {id(p) for p in (*student.body.parameters(), *student.projector.parameters())} == trained


def test_a_map_that_equals_the_teachers_has_loss_0_and_its_logits():
    of = teacher()
    student = built("cifar_resnet8", of)
    for name, value in of.get_classifier().state_dict().items():
        student.get_classifier().state_dict()[name].copy_(value)
    with torch.no_grad():
        feature_map = of.forward_features(IMAGES)
        assert torch.equal(student.forward_head(feature_map), of.forward_head(feature_map))
    assert simkd_loss(feature_map, feature_map).abs().max() == 0


@pytest.mark.parametrize("body", ["cifar_resnet8", "cifar_shufflenetv2", "cifar_wrn_16_1", "cifar_mobilenetv2_050"])
def test_student_and_teacher_may_have_other_channels_and_grids(body):
    student = built(body, teacher())
    output = ModelOutput(student(IMAGES), student.forward_features(IMAGES), {}, {}, {})
    with torch.no_grad():
        wanted = teacher().forward_features(IMAGES)
    assert output.feature_map.shape[1] == wanted.shape[1]
    loss, _ = SimKD(*(ModelFacts(7, (MapShape(*m.shape[1:]),)) for m in (output.feature_map, wanted)))(
        output, ModelOutput(output.logits, wanted, {}, {}, {}), TARGET
    )
    loss.backward()
    assert student.pool_to is None
    assert all(p.grad is not None for p in student.projector.parameters())
    assert all(p.grad is None for p in student.head.parameters())


def test_a_student_of_the_larger_grid_is_averaged_first_also_when_it_predicts():
    of = teacher("cifar_mobilenetv2_050")
    with torch.no_grad():
        grid = of.forward_features(IMAGES).shape[-2:]
    student = built("cifar_resnet8", of)
    assert student.pool_to == tuple(grid)
    assert student.forward_features(IMAGES).shape[-2:] == grid


def test_the_last_relu_is_left_out_for_a_teacher_whose_map_has_negative_values():
    assert isinstance(built("cifar_resnet8", teacher()).projector[-1], torch.nn.ReLU)
    signed = timm.create_model("mobilenetv2_100", num_classes=7, act_layer="silu").eval()
    images = torch.randn(2, 3, 64, 64)
    plain = timm.create_model("cifar_resnet8", num_classes=7)
    student = build_simkd_student(plain, signed, teacher_images=images, student_images=IMAGES)
    assert isinstance(student.projector[-1], torch.nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("convnext_atto", {}, "logits are not those of its classifier on the mean of its map"),
        ("vit_tiny_patch16_224", {"img_size": 32}, "logits are not those of its classifier"),
        ("mobilenetv3_small_050", {}, "classifier reads 1024 numbers, its map has 288"),
    ],
)
def test_a_teacher_whose_head_does_more_is_refused_with_the_reason(name, options, line):
    with pytest.raises(ValueError, match=line):
        built("cifar_resnet8", teacher(name, **options))


@pytest.mark.parametrize(
    ("student", "wanted", "factor", "count"),
    [(256, 256, 2, 214016), (960, 256, 4, 115456), (464, 256, 8, 32896), (512, 2048, 2, 12066816)],
)
def test_the_projector_has_the_published_number_of_parameters(student, wanted, factor, count):
    assert sum(p.numel() for p in projector(student, wanted, factor, rectified=True).parameters()) == count


def test_a_vit_body_is_projected_on_its_token_grid():
    images = torch.randn(2, 3, 64, 64)
    of = teacher()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64)
    student = build_simkd_student(plain, of, teacher_images=IMAGES, student_images=images)
    assert student.forward_features(images).shape == (2, 256, 4, 4)
    assert student(images).shape == (2, 7)


@pytest.mark.parametrize(
    ("body", "options", "unread"),
    [
        ("mobilenetv3_small_050", {}, "conv_head.weight"),
        ("xcit_nano_12_p16_224", {"img_size": 64}, None),
        ("cifar_resnet8", {}, None),
    ],
)
def test_all_that_trains_of_it_has_a_gradient_and_what_its_map_never_reads_is_frozen(body, options, unread):
    plain = timm.create_model(body, num_classes=7, **options)
    images = torch.randn(4, 3, 64, 64)
    student = build_simkd_student(plain, teacher(), teacher_images=IMAGES, student_images=images)
    student(images).square().sum().backward()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    frozen = {name for name, p in student.body.named_parameters() if not p.requires_grad}
    assert (unread in frozen) if unread else not frozen


def test_a_body_that_cannot_be_made_without_its_head_is_refused():
    name = "deit_tiny_distilled_patch16_224"
    images = torch.randn(2, 3, 64, 64)
    plain = timm.create_model(name, num_classes=7, img_size=64, depth=1)
    with pytest.raises(ValueError, match=rf"{name} cannot be made without its head \(.*\); take another student"):
        build_simkd_student(plain, teacher(), teacher_images=IMAGES, student_images=images)


def test_it_serves_as_a_backbone_with_stages_of_its_body():
    student = built("cifar_resnet8", teacher())
    needs = Needs(region_logits=(PYRAMID,), stages=(-1, -2))
    backbone = Backbone(student, examine(student, spec(32)), needs)
    output = backbone(torch.rand(2, 3, 32, 32))
    assert backbone.mechanism == "pool"
    assert output.feature_map.shape == (2, 256, 8, 8)
    assert output.stages[-2].shape == (2, 32, 16, 16)
    torch.testing.assert_close(output.region_logits[PYRAMID][:, 0], output.logits)


def test_plain_timm_loads_the_export_after_one_import(tmp_path):
    student = built("cifar_resnet8", teacher("cifar_mobilenetv2_050"), factor=4)
    export_student(student, tmp_path, input_spec=spec(32), metadata={"teacher": "cifar_mobilenetv2_050"})
    torch.save({"images": IMAGES, "logits": student(IMAGES).detach()}, tmp_path / "expected.pt")
    code = (
        "import sys, timm, torch, distill.models\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"  # the order of additions is the threads'
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(expected['images']), expected['logits'])\n"
        "assert model.pretrained_cfg['input_size'] == (3, 32, 32)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "simkd_student"
    assert config["model_args"]["body"] == "cifar_resnet8"
    assert "import distill.models" in (tmp_path / "README.md").read_text()


def test_a_fresh_classifier_trains():
    student = built("cifar_resnet8", teacher())
    student.reset_classifier(5)
    assert student(IMAGES).shape == (3, 5)
    assert all(p.requires_grad for p in student.get_classifier().parameters())


def test_building_it_leaves_both_models_as_they_were():
    of, plain = teacher().train(), timm.create_model("cifar_resnet8", num_classes=7)
    before = {name: value.clone() for model in (of, plain) for name, value in model.state_dict(prefix=str(id(model))).items()}
    student = build_simkd_student(plain, of, teacher_images=IMAGES, student_images=IMAGES)
    after = {name: value for model in (of, plain) for name, value in model.state_dict(prefix=str(id(model))).items()}
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert of.training
    assert student.training


def test_another_number_of_classes_is_refused():
    with pytest.raises(ValueError, match="classifier of 7 classes; 5 were asked for"):
        build_simkd_student(
            timm.create_model("cifar_resnet8", num_classes=5), teacher(), teacher_images=IMAGES, student_images=IMAGES
        )


def test_a_plain_student_is_refused_with_the_remedy():
    facts = [ModelFacts(7, (MapShape(width, 8, 8),)) for width in (64, 256)]
    with pytest.raises(ValueError, match=r"64 channels with the teacher's of 256; the student must be a\s+simkd_student"):
        SimKD(*facts)
    with pytest.raises(ValueError, match=r"factor 0 must lie in 1\.\.256"):
        projector(64, 256, 0, rectified=True)
