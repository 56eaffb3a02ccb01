"""The batch that a run keeps for its report is what the transform gave, and the training does not notice."""

from pathlib import Path

import numpy as np
import torch

from distill.batch_transform import BatchTransform
from distill.protocols import Batch
from pipelines.reporting.first_batch import FirstBatch, keeping_first

NAMES = ("cat", "dog")


def batch_of(side: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, side, side, 3), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.tensor([0, 1, 1, 0]), torch.arange(4))


def transform_of(cutmix: float) -> BatchTransform:
    means = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    mixing = {"mixup": 0.0, "cutmix": cutmix, "mix_probability": 1.0, "cutmix_share": 1.0}
    erasing = {"erasing": 0.0, "erasing_mode": "pixel"}
    return BatchTransform(num_classes=2, device=torch.device("cpu"), channels_last=True, **means, **mixing, **erasing)


def test_the_first_batch_is_kept_and_no_later_one(tmp_path: Path):
    kept = keeping_first(transform_of(0.0), tmp_path, NAMES)
    for seed in (0, 1):
        batch = batch_of(8, seed)
        assert torch.equal(kept(batch, 0)[0], transform_of(0.0)(batch, 0)[0])
    found = FirstBatch.read(tmp_path)
    assert np.array_equal(found.images, batch_of(8, 0).images)
    assert found.labels == ["cat", "dog", "dog", "cat"]
    keeping_first(transform_of(0.0), tmp_path, NAMES)(batch_of(8, 2), 0)  # a run that is resumed
    assert np.array_equal(FirstBatch.read(tmp_path).images, batch_of(8, 0).images)


def test_mixed_images_have_both_labels_with_their_shares(tmp_path: Path):
    np.random.seed(0)  # noqa: NPY002  # timm's mixing draws from it
    _, labels = keeping_first(transform_of(1.0), tmp_path, NAMES)(batch_of(8), 0)
    said = FirstBatch.read(tmp_path).labels
    for row, words in zip(labels.tolist(), said, strict=True):
        assert set(words.split(", ")) == {f"{name} {share:.0%}" for name, share in zip(NAMES, row, strict=True) if share}


def test_large_images_are_kept_small(tmp_path: Path):
    keeping_first(transform_of(0.0), tmp_path, NAMES)(batch_of(320), 0)
    assert FirstBatch.read(tmp_path).images.shape == (4, 160, 160, 3)


def test_a_folder_without_a_whole_batch_has_none(tmp_path: Path):
    assert FirstBatch.read(tmp_path) is None
    (tmp_path / "first_batch.npz").write_bytes(b"PK\x03\x04")
    assert FirstBatch.read(tmp_path) is None
