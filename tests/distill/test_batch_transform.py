"""What the device does to a batch: mixing that ends with an epoch."""

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
