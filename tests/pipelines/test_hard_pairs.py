"""Fifteen pairs that are hard for a reason each, trained two steps on photographs with both papers' losses.

Skipped where the photographs are not at hand; the mechanisms behind them run on made images in tests/models.
"""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.batch_transform import to_pixels
from distill.data.augment.parameters import TrainTransform
from distill.data.index import ShardIndex
from distill.data.loaders import train_task
from distill.data.reference import ReferenceLoader
from distill.distiller import Distiller
from distill.losses import LOSSES
from distill.models.build import create_student, probe
from distill.models.describe import create_outline
from distill.models.input_spec import input_spec_of
from distill.protocols import Batch, Progress, Target
from shards.prepare import main as prepare

PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "../shared/data/imagenet_sample.tar"
IMAGES = 8
CLASSES = 1000  # of which these images are some; a random teacher would put all regions into one of eight
PAIRS = [
    # teacher, its side in pixels, arguments; student, its side; why
    pytest.param("regnety_160", 64, {}, "mobilenetv3_large_100", 64, id="a convolution after the student's pool"),
    pytest.param("deit3_base_patch16_224", 64, {"img_size": 64}, "resnet50", 64, id="a class-token teacher"),
    pytest.param("convnext_base", 64, {}, "deit_small_patch16_224", 64, id="a map against tokens with a class token"),
    pytest.param(
        "swin_base_patch4_window7_224", 64, {"img_size": 64}, "mobilenetv4_conv_small", 64, id="NHWC, BatchNorm in the head"
    ),
    pytest.param("convnext_small", 64, {}, "resnet18", 64, id="a norm after the teacher's pool"),
    pytest.param("mixer_b16_224", 64, {"img_size": 64}, "resnet18", 64, id="tokens without a class token"),
    pytest.param("regnety_160", 64, {}, "deit_tiny_distilled_patch16_224", 64, id="two heads, two prefix tokens"),
    pytest.param("maxvit_tiny_tf_224", 64, {"img_size": 64}, "efficientnet_b0", 64, id="a norm and a layer in the head"),
    pytest.param("convnextv2_tiny", 64, {}, "efficientvit_b1", 64, id="convolution and BatchNorm before the pool"),
    pytest.param("fastvit_ma36", 96, {}, "mobileone_s0", 64, id="two sizes, both reparameterised"),
    pytest.param("dm_nfnet_f0", 64, {}, "ghostnetv2_100", 96, id="an activation after the last stage"),
    pytest.param("tiny_vit_21m_384", 96, {}, "tiny_vit_5m_224", 64, id="fixed windows of other sizes"),
    pytest.param("xcit_small_12_p8_224", 64, {"img_size": 64}, "cait_xxs24_224", 64, id="two class-attention nets, two grids"),
    pytest.param(
        "eva02_small_patch14_224", 56, {"img_size": 56}, "pvt_v2_b1", 64, id="no classifier by default, other patches"
    ),
    pytest.param("hiera_base_224", 64, {"img_size": 64}, "levit_128s", 96, id="unrolled tokens, BatchNorm over tokens"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Eight photographs of eight classes, as shards."""
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
        global_batch_size=IMAGES // 2,
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


@pytest.mark.parametrize(("teacher_name", "teacher_side", "kwargs", "student_name", "student_side"), PAIRS)
def test_the_pair_trains_with_both_papers_losses(
    teacher_name: str, teacher_side: int, kwargs: dict, student_name: str, student_side: int, photographs: ShardIndex
):
    torch.manual_seed(0)
    ours = create_student(student_name, num_classes=CLASSES, image_size=student_side)
    model = create_outline(teacher_name, num_classes=CLASSES, **kwargs)
    own = replace(input_spec_of(model), height=teacher_side, width=teacher_side)
    theirs = probe(model, name=teacher_name, input_spec=own, frozen=True)
    criteria = {
        "cross_entropy": LOSSES["cross_entropy"](),
        "sdd": LOSSES["sdd"](base="dkd"),
        "msdcrd": LOSSES["msdcrd"](ours.facts, theirs.facts),
    }
    student = ours.backbone(criteria["sdd"].student_needs | criteria["msdcrd"].student_needs).train()
    teacher = theirs.backbone(criteria["sdd"].teacher_needs | criteria["msdcrd"].teacher_needs)
    distiller = Distiller(student, criteria, dict.fromkeys(criteria, lambda _: 1.0))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)

    batches = two_batches(photographs, max(teacher_side, student_side))
    assert len(batches) == 2
    for step, batch in enumerate(batches):
        images = to_pixels(batch.images)
        with torch.no_grad():
            theirs = teacher(images)
        losses = distiller(images, theirs, Target(batch.labels, batch.sample_ids, Progress(step, 2, 2)))
        assert losses.terms.keys() == criteria.keys()
        assert all(bool(term.isfinite()) and float(term.detach()) > 0 for term in losses.terms.values()), losses.terms
        optimizer.zero_grad()
        losses.total.backward()
        trained = dict(distiller.named_parameters())
        assert [name for name, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())] == []
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
