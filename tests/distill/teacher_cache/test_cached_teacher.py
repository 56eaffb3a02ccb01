"""A teacher through a cache and back, without a loader: heads that read class tokens, class maps, weights in bfloat16."""

from pathlib import Path

import numpy as np
import pytest
import torch

import distill.models  # noqa: F401 (registers the small nets)
from distill.models.build import create_teacher
from distill.models.teacher import FrozenTeacher
from distill.protocols import Batch, Needs, Regions
from distill.teacher_cache.files import TeacherCache
from distill.teacher_cache.teacher import WHOLE, CachedTeacher, Recorder, asked_regions, codec_facts, regions_of
from distill.teacher_cache.writer import Writer

FINE, COARSE = Regions((1, 2, 4)), Regions((1, 2))
IMAGES = 5


def teacher(name: str, regions: Regions, size: int, precision: str = "auto", **options) -> FrozenTeacher:
    torch.manual_seed(0)
    made = create_teacher(name, weights="random", num_classes=9, image_size=size, **options)
    return FrozenTeacher(made.backbone(Needs(region_logits=(regions, WHOLE))), torch.contiguous_format, precision)


def recorded(folder: Path, live: FrozenTeacher, images: torch.Tensor, labels: torch.Tensor, codec: str) -> TeacherCache:
    """A finished cache of these images, one view."""
    regions = asked_regions(live.backbone.needs)
    listed = [{"scales": list(r.scales), "mode": r.mode, "windows": list(r.windows), "stride": r.stride} for r in regions]
    facts = {"format": 1, "num_samples": IMAGES, "unit": IMAGES, "batch": IMAGES, "regions": listed}
    writer = Writer(folder, {**facts, "codec": codec_facts(codec, live, "fp16", 4)})
    assert regions_of(writer.facts) == regions
    writer.begin(1)
    writer.allocate(1)
    [unit] = writer.missing(1)
    writer.write(unit, 0, Recorder(live, writer.codec, regions).record(images, labels))
    writer.mark(unit, 0, [])
    writer.finish(1, ["-"])
    return TeacherCache.open(folder)


def both(cache: TeacherCache, reader: FrozenTeacher, images: torch.Tensor, labels: torch.Tensor):
    rows = torch.from_numpy(cache.read(0, np.arange(IMAGES)))
    batch = Batch(images, labels, torch.arange(IMAGES), rows)
    with torch.no_grad():
        return reader(images), CachedTeacher(reader, cache)(images, batch)


def test_topk_keeps_the_largest_logits_of_the_regions_of_a_head_that_reads_class_tokens(tmp_path: Path):
    live = teacher("vit_tiny_patch16_224", FINE, 64)
    with pytest.raises(ValueError, match=r"cannot be cached as features: its head reads more than means .* take --codec topk"):
        codec_facts("features", live, "fp16", 4)
    images, labels = torch.rand(IMAGES, 3, 64, 64), torch.arange(IMAGES)
    cache = recorded(tmp_path, live, images, labels, "topk")
    whole, found = both(cache, teacher("vit_tiny_patch16_224", COARSE, 64), images, labels)
    assert found.region_logits[COARSE].shape == (IMAGES, 5, 9)
    for name in (COARSE, WHOLE):
        kept, index = whole.region_logits[name].topk(4, dim=2)
        assert torch.allclose(found.region_logits[name].gather(2, index), kept, atol=0.01)
        assert torch.allclose(found.region_logits[name].logsumexp(2), whole.region_logits[name].logsumexp(2), atol=0.01)


@pytest.mark.parametrize("name", ["cifar_resnet8", "efficientvit_b0"])
def test_features_of_bfloat16_weights_come_back_through_the_same_weights(name: str, tmp_path: Path):
    size = 32 if name.startswith("cifar") else 96
    live = teacher(name, FINE, size, "bf16")
    images, labels = torch.rand(IMAGES, 3, size, size), torch.arange(IMAGES)
    cache = recorded(tmp_path, live, images, labels, "features")
    whole, found = both(cache, teacher(name, COARSE, size, "bf16"), images, labels)
    apart = (whole.region_logits[COARSE].float() - found.region_logits[COARSE].float()).abs().mean()
    assert apart < 0.03 * whole.region_logits[COARSE].float().std()  # bfloat16 has 8 bits


def test_logits_are_in_the_order_of_the_datas_classes_as_the_live_ones(tmp_path: Path):
    order = tmp_path / "classes.txt"
    order.write_text("".join(f"{number}\n" for number in (8, 0, 3, 1, 2, 4, 5, 6, 7)))
    live = teacher("cifar_resnet8", COARSE, 32, class_map=str(order), model_kwargs={})
    images, labels = torch.rand(IMAGES, 3, 32, 32), torch.arange(IMAGES)
    cache = recorded(tmp_path / "cache", live, images, labels, "features")
    whole, found = both(cache, live, images, labels)
    assert torch.allclose(whole.logits, found.logits, atol=1e-3 * float(whole.logits.std()))


def test_regions_that_a_cache_lacks_are_refused(tmp_path: Path):
    live = teacher("cifar_resnet8", COARSE, 32)
    cache = recorded(tmp_path, live, torch.rand(IMAGES, 3, 32, 32), torch.arange(IMAGES), "features")
    with pytest.raises(ValueError, match="no mean of the stored cells"):
        CachedTeacher(teacher("cifar_resnet8", FINE, 32), cache)
