"""What the device does to a batch: mixing that ends with an epoch, erasing that leaves plain views alone."""

import torch

from distill.batch_transform import BatchTransform
from distill.protocols import Batch
from distill.seeds import seed_all


def made(**options: float) -> BatchTransform:
    settings = {"mixup": 0.0, "cutmix": 1.0, "mix_probability": 1.0, "cutmix_share": 0.5, "erasing": 0.0, **options}
    cpu = torch.device("cpu")
    return BatchTransform(
        num_classes=4, mean=(0.5,) * 3, std=(0.2,) * 3, device=cpu, channels_last=True, erasing_mode="pixel", **settings
    )


def test_from_its_epoch_on_nothing_is_mixed_and_labels_stay_soft():
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    batch = Batch(images, torch.tensor([0, 1, 2, 3]), torch.arange(4))
    transform, plain = made(mix_off_epoch=3), images.permute(0, 3, 1, 2) / 255
    for epoch in (2, 3, 2, 7):  # a resumed run may come to any of them first
        seed_all(0)
        seen, labels = transform(batch, epoch)
        assert labels.is_floating_point()
        torch.testing.assert_close(labels.sum(1), torch.ones(4))
        assert torch.equal(labels, torch.eye(4)) is (epoch >= 3)
        assert torch.equal(seen, plain) is (epoch >= 3)
    seed_all(0)
    assert not torch.equal(made()(batch, 100)[1], torch.eye(4)), "0 is never off"


def test_erasing_leaves_plain_rows_alone_and_draws_the_same_for_the_others():
    transform, plain = made(cutmix=0.0, erasing=1.0), torch.tensor([True, False] * 3)
    images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)
    batch = Batch(images, torch.zeros(6, dtype=torch.int64), torch.arange(6))
    seen = []
    for each in (batch, batch._replace(plain=plain)):
        seed_all(0)
        seen.append(transform(each)[0])
    everything, some = seen
    assert torch.equal(some[plain], images[plain].permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(some[~plain], everything[~plain])
    assert some.is_contiguous(memory_format=torch.channels_last)
