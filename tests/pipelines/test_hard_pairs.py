"""Fifteen pairs that are hard for a reason each, trained two steps on photographs with every loss that serves them.

Skipped where the photographs are not at hand; the mechanisms behind them run on made images in tests/distill/models.
"""

import re
import tarfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.batch_transform import to_pixels
from distill.config import RecipeError
from distill.data.augment.parameters import TrainTransform
from distill.data.index import ShardIndex
from distill.data.loaders import train_task
from distill.data.reference import ReferenceLoader
from distill.distiller import Distiller
from distill.losses import LOSSES
from distill.models.build import ProbedModel, create_student, probe
from distill.models.describe import create_outline, outlined
from distill.models.input_spec import input_spec_of
from distill.protocols import Batch, Criterion, DataFacts, Progress, Target
from pipelines.setup.models import needs_of, served_losses, student_of
from shards.prepare import main as prepare

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "../shared/data/imagenet_sample.tar"
IMAGES = 16
BATCH = 8  # of fewer images semckd's attention has nothing to learn from
CLASSES = 1000  # of which these images are some; a random teacher would put all regions into one of eight
OPTIONS = {"sdd": {"base": "dkd"}, "wkd_feature": {"grid": 1}, "ab": {"match": "pool"}, "ft": {"paraphraser_epochs": 1}}
"""Beside the defaults: the papers' base, what the small maps of these small images need, and FT's second part."""

TOO_LARGE = 2e7
"""Parameters of a loss above which it is made and not trained: those to a teacher of wide last stages."""
HEAVY = ("semckd", "ft", "vid")
"""Losses that can have as many. A step of them takes up to half a minute; the other pairs show that they train."""

NOT_AFFINE = "cannot give the bias of its head: its logits are no affine function of the map's mean"
MORE_THAN_MEAN = "cannot give the bias of its head: its head reads more than the mean of the map"
OTHER_HEAD = "simkd needs a teacher of global average pooling and one linear layer"
GRIDS = "no convolution brings a .* map to .*; set match: pool"
CHANNELS = {"fsp": "stages of equal channels|both models need two"}
"""No two of these models are of one family and width."""
NO_CLASSIFIER = {
    **dict.fromkeys(
        ("kd", "dkd", "nkd", "ctkd"), r"eva02_small_patch14_224 has no classifier \(num_classes 0\) and cannot give logits"
    ),
    "sdd": r"eva02_small_patch14_224 has no classifier \(num_classes 0\) and cannot give region logits; take a loss",
    **dict.fromkeys(("dist", "wkd_logit", "cat_kd", "mlkd"), "compares classes and got a student of 1000 and a teacher of 0"),
    "msdcrd": "set categories to labels, or mask_same_category to false",
    "simkd": "its student takes the teacher's classifier; name a teacher with one",
    "srrl": "asks the teacher's classifier, and this one has none",
}
NO_EMBEDDING = dict.fromkeys(
    ("pkt", "rkd", "crd", "wcord", "cc", "srrl"), "the student has no such layer; take one on maps, such as sp"
)
PAIRS = [
    # teacher, its side in pixels, arguments; student, its side; losses that are refused, with the reason; why it is hard
    pytest.param(
        "regnety_160", 64, {}, "mobilenetv3_large_100", 64, {"cat_kd": NOT_AFFINE}, id="a convolution after the student's pool"
    ),
    pytest.param(
        "deit3_base_patch16_224",
        64,
        {"img_size": 64},
        "resnet50",
        64,
        {"cat_kd": MORE_THAN_MEAN, "simkd": OTHER_HEAD},
        id="a class-token teacher",
    ),
    pytest.param(
        "convnext_base",
        64,
        {},
        "deit_small_patch16_224",
        64,
        {"cat_kd": MORE_THAN_MEAN, "simkd": OTHER_HEAD},
        id="a map against tokens with a class token",
    ),
    pytest.param(
        "swin_base_patch4_window7_224",
        64,
        {"img_size": 64},
        "mobilenetv4_conv_small",
        64,
        {"cat_kd": NOT_AFFINE},
        id="NHWC, BatchNorm in the head",
    ),
    pytest.param(
        "convnext_small",
        64,
        {},
        "resnet18",
        64,
        {"cat_kd": NOT_AFFINE, "simkd": OTHER_HEAD},
        id="a norm after the teacher's pool",
    ),
    pytest.param("mixer_b16_224", 64, {"img_size": 64}, "resnet18", 64, {}, id="tokens without a class token"),
    pytest.param(
        "regnety_160",
        64,
        {},
        "deit_tiny_distilled_patch16_224",
        64,
        {"cat_kd": MORE_THAN_MEAN, "simkd": "cannot be made without its head", **NO_EMBEDDING},
        id="two heads, two prefix tokens",
    ),
    pytest.param(
        "maxvit_tiny_tf_224",
        64,
        {"img_size": 64},
        "efficientnet_b0",
        64,
        {"cat_kd": NOT_AFFINE, "simkd": OTHER_HEAD},
        id="a norm and a layer in the head",
    ),
    pytest.param(
        "convnextv2_tiny",
        64,
        {},
        "efficientvit_b1",
        64,
        {"cat_kd": MORE_THAN_MEAN, "simkd": OTHER_HEAD},
        id="convolution and BatchNorm before the pool",
    ),
    pytest.param("fastvit_ma36", 96, {}, "mobileone_s0", 64, {"fitnet": GRIDS}, id="two sizes, both reparameterised"),
    pytest.param("dm_nfnet_f0", 64, {}, "ghostnetv2_100", 96, {"cat_kd": NOT_AFFINE}, id="an activation after the last stage"),
    pytest.param(
        "tiny_vit_21m_384",
        96,
        {},
        "tiny_vit_5m_224",
        64,
        {"cat_kd": NOT_AFFINE, "simkd": OTHER_HEAD, "fitnet": GRIDS},
        id="fixed windows of other sizes",
    ),
    pytest.param(
        "xcit_small_12_p8_224",
        64,
        {"img_size": 64},
        "cait_xxs24_224",
        64,
        {"cat_kd": MORE_THAN_MEAN, "simkd": OTHER_HEAD},
        id="two class-attention nets, two grids",
    ),
    pytest.param(
        "eva02_small_patch14_224",
        56,
        {"img_size": 56},
        "pvt_v2_b1",
        64,
        {"cat_kd": NOT_AFFINE, "simkd": OTHER_HEAD},
        id="other patches",
    ),
    pytest.param(
        "eva02_small_patch14_224",
        56,
        {"img_size": 56, "num_classes": 0},
        "pvt_v2_b1",
        64,
        NO_CLASSIFIER,
        id="the same as published, without a classifier",
    ),
    pytest.param(
        "hiera_base_224",
        64,
        {"img_size": 64},
        "levit_128s",
        96,
        {"cat_kd": "has BatchNorm, which is not affine in training", "simkd": OTHER_HEAD, "fitnet": GRIDS, **NO_EMBEDDING},
        id="unrolled tokens, BatchNorm over tokens",
    ),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Sixteen photographs, as shards."""
    if not PHOTOGRAPHS.is_file():
        pytest.skip("no photographs: ../shared/data/imagenet_sample.tar is not there")
    folder = tmp_path_factory.mktemp("photographs")
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = [m for m in archive if m.isfile()][:IMAGES]
        archive.extractall(folder, members, filter="data")
    source = ["--source", str(folder / "imagenet_sample"), "--out", str(folder / "shards"), "--shards", "1"]
    assert prepare(["folder", *source]) == 0
    return ShardIndex.open(folder / "shards")


def two_batches(index: ShardIndex, side: int) -> list[Batch]:
    task = train_task(
        index,
        size=(side, side),
        transform=TrainTransform(),
        global_batch_size=BATCH,
        accumulate=1,
        rank=0,
        world_size=1,
        seed=0,
        device=torch.device("cpu"),
        num_threads=1,
    )
    loader = ReferenceLoader(task)
    batches = list(loader.epoch(0))
    loader.close()
    return batches


def losses_of(
    student: ProbedModel, teacher: ProbedModel, data: DataFacts, build: Callable[..., Any]
) -> dict[str, Criterion | str]:
    """Every loss or why it is refused, in outline: the regressors to a teacher of 3,000 channels would take 16 GB."""
    found: dict[str, Criterion | str] = {}

    def make() -> nn.ModuleDict:
        found.update(served_losses(student, teacher, data, OPTIONS, build))
        return nn.ModuleDict({name: each for name, each in found.items() if isinstance(each, Criterion)})

    outlined(make)
    return found


def train(student: ProbedModel, teacher: ProbedModel, criteria: Mapping[str, Criterion], batches: list[Batch]) -> None:
    """Two optimiser steps of all these losses together, each finite and with finite gradients."""
    student_needs, teacher_needs = needs_of(criteria)
    ours, theirs = student.backbone(student_needs).train(), teacher.backbone(teacher_needs)
    distiller = Distiller(ours, criteria, dict.fromkeys(criteria, lambda _: 1.0))
    learning = {name: p for name, p in distiller.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(learning.values(), lr=1e-4)
    for step, batch in enumerate(batches):
        images = to_pixels(batch.images)
        with torch.no_grad():
            output = theirs(images)
        generator = torch.Generator().manual_seed(step)
        plain = torch.arange(len(images)) % 2 == 0
        losses = distiller(images, output, Target(batch.labels, batch.sample_ids, Progress(step, 1, 2), generator, plain))
        assert losses.terms.keys() == criteria.keys()
        assert [name for name, term in losses.terms.items() if not (term.isfinite() and term.requires_grad)] == []
        optimizer.zero_grad()
        losses.total.backward()
        assert [name for name, p in learning.items() if p.grad is None or not bool(p.grad.isfinite().all())] == []
        optimizer.step()
    assert all(p.grad is None for p in theirs.parameters())


@pytest.mark.parametrize(("teacher_name", "teacher_side", "kwargs", "student_name", "student_side", "refused"), PAIRS)
def test_the_pair_trains_with_every_loss_that_serves_it_and_the_others_are_refused_with_the_reason(
    teacher_name: str,
    teacher_side: int,
    kwargs: dict,
    student_name: str,
    student_side: int,
    refused: dict,
    photographs: ShardIndex,
):
    torch.manual_seed(0)
    student = create_student(student_name, num_classes=CLASSES, image_size=student_side)
    model = create_outline(teacher_name, **{"num_classes": CLASSES, **kwargs})
    own = replace(input_spec_of(model), height=teacher_side, width=teacher_side)
    teacher = probe(model, name=teacher_name, input_spec=own, frozen=True)
    batches = two_batches(photographs, max(teacher_side, student_side))
    assert len(batches) == 2
    built: dict[Callable, nn.Module] = {}

    def build(make: partial) -> nn.Module:  # by the method that makes it: a loss's own student is made once
        return built[make.func] if make.func in built else built.setdefault(make.func, make())

    builders = [name for name, loss in LOSSES.items() if loss.build_student is not None]
    for name in builders:
        with suppress(RecipeError):  # whoever refuses it, says so again below; this student trains, so it is made in full
            student_of(name, {}, student, teacher, build)
    found = losses_of(student, teacher, DataFacts(IMAGES, torch.from_numpy(photographs.labels), BATCH), build)
    reasons = {name: each for name, each in found.items() if isinstance(each, str)}
    refused = CHANNELS | refused
    assert reasons.keys() == refused.keys(), reasons
    assert all(re.search(refused[name], reason) for name, reason in reasons.items()), reasons

    served = {name: each for name, each in found.items() if isinstance(each, Criterion)}
    for name in HEAVY:
        if sum(p.numel() for p in served[name].parameters()) > TOO_LARGE:
            del served[name]
    alone = {name: served.pop(name) for name in builders if name in served}
    train(student, teacher, served, batches)
    for name, criterion in alone.items():
        train(student_of(name, {}, student, teacher, build), teacher, {name: criterion}, batches)
