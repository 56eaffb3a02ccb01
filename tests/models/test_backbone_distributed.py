"""A backbone under DistributedDataParallel: two real processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from model_support import PYRAMID, backbone
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.models.batchnorm import set_batchnorm
from distill.protocols import Needs

VIT = {"depth": 2, "img_size": 64}
# one of each mechanism: pool with BatchNorm inside the head, split, crop, token
MODELS = (
    ("mobilenetv4_conv_small_035", {}),
    ("efficientvit_b0", {}),
    ("vit_tiny_patch16_224", {**VIT, "global_pool": "map"}),
    ("vit_tiny_patch16_224", VIT),
)


class RegionLoss(nn.Module):
    """The smallest thing that DDP can wrap and that reads everything."""

    def __init__(self, name: str, kwargs: dict) -> None:
        super().__init__()
        needs = Needs((PYRAMID,), (PYRAMID,), (-1,))
        self.backbone = set_batchnorm(backbone(name, 64, needs, **kwargs).train(), "frozen")

    def forward(self, images: Tensor) -> Tensor:
        output = self.backbone(images)
        regions = output.region_logits[PYRAMID].square().mean() + output.region_features[PYRAMID].square().mean()
        return regions + output.stages[-1].square().mean()


def batch() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def train_on_half(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gradients = []
    for name, kwargs in MODELS:
        wrapped = DistributedDataParallel(RegionLoss(name, kwargs))
        wrapped(batch().chunk(2)[rank]).backward()
        gradients += [p.grad for p in wrapped.module.parameters() if p.requires_grad]
    torch.save({"world": dist.get_world_size(), "gradients": gradients}, f"{out}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one_for_every_mechanism(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [context.Process(target=train_on_half, args=(r, str(tmp_path / "store"), str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = []
    for name, kwargs in MODELS:
        alone = RegionLoss(name, kwargs)
        alone(batch()).backward()
        expected += [p.grad for p in alone.parameters() if p.requires_grad]
    ranks = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert all(gradient is not None for gradient in expected)
    for rank in ranks:
        for mine, theirs in zip(rank["gradients"], expected, strict=True):
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6
