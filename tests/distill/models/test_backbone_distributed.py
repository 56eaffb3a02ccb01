"""A pair of each mechanism, compiled and under DDP on two real processes, trains as one eager process does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.distiller import Distiller
from distill.losses import LOSSES
from distill.models.batchnorm import set_batchnorm
from distill.protocols import MapShape, ModelFacts, ModelOutput, Progress, Target
from tests.distill.models.model_support import backbone

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PAIRS = {
    "pool": ("cifar_resnet8", 32, {}),
    "split": (
        "efficientvit_b0",
        64,
        {"widths": (8, 8, 16, 16, 16), "depths": (1,) * 5, "head_dim": 8, "head_widths": (32, 32)},
    ),
    "crop": ("vit_tiny_patch16_224", 32, {**VIT, "global_pool": "map"}),
    "token:attend": ("vit_tiny_patch16_224", 32, VIT),
}
"""Teacher and student are one architecture, so the contrast needs no projector, whose BatchNorm would see half a batch."""
FACTS = ModelFacts(10, (MapShape(1, 1, 1),))  # without a projector only the number of stages matters
STEPS, BATCH = 2, 8


class Pair(nn.Module):
    """A distiller and its teacher as the main job has them: the teacher's output comes from outside."""

    def __init__(self, mechanism: str, compiled: bool) -> None:
        super().__init__()
        name, size, kwargs = PAIRS[mechanism]
        self.size = size
        criteria = {
            "cross_entropy": LOSSES["cross_entropy"](),
            "sdd": LOSSES["sdd"](base="dkd"),
            "msdcrd": LOSSES["msdcrd"](FACTS, FACTS, stages="last", projector="none", gather=True),
        }
        student_needs = criteria["sdd"].student_needs | criteria["msdcrd"].student_needs
        teacher_needs = criteria["sdd"].teacher_needs | criteria["msdcrd"].teacher_needs
        self.student = set_batchnorm(backbone(name, size, student_needs, **kwargs).train(), "frozen")
        self.teacher = backbone(name, size, teacher_needs, seed=1, **kwargs).eval()
        assert self.student.mechanism == self.teacher.mechanism == mechanism
        with torch.no_grad():
            # without their mean, a random teacher's logits put regions into several classes
            self.teacher.model.get_classifier().bias.sub_(self.teacher(torch.rand(16, 3, size, size)).logits.mean(0))
        if compiled:
            self.student.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        self.distiller = Distiller(self.student, criteria, dict.fromkeys(criteria, lambda _: 1.0))

    def look(self, images: Tensor) -> ModelOutput:
        with torch.no_grad():
            return self.teacher(images)


def losses(mechanism: str, rank: int, world: int) -> list[dict[str, float]]:
    """Each term of each step on this rank's share of the batches."""
    pair = Pair(mechanism, compiled=world > 1)
    distiller = DistributedDataParallel(pair.distiller) if world > 1 else pair.distiller
    optimizer = torch.optim.SGD([p for p in pair.distiller.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        images = torch.rand(BATCH, 3, pair.size, pair.size, generator=generator).chunk(world)[rank]
        labels = torch.randint(10, (BATCH,), generator=generator).chunk(world)[rank]
        result = distiller(images, pair.look(images), Target(labels, progress=Progress(step, STEPS, STEPS)))
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        found.append({name: float(term.detach()) for name, term in result.terms.items()})
    return found


def train_on_half(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {mechanism: losses(mechanism, rank, dist.get_world_size()) for mechanism in PAIRS}
    torch.save(found, f"{out}/{rank}.pth")
    dist.destroy_process_group()


def test_two_compiled_processes_give_the_losses_of_one_eager_process_for_every_mechanism(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    processes = [context.Process(target=train_on_half, args=(r, str(tmp_path / "store"), str(tmp_path))) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    halves = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2)]
    for mechanism in PAIRS:
        alone = losses(mechanism, 0, 1)
        assert alone[0] != alone[1]
        for step, terms in enumerate(alone):
            for name, value in terms.items():
                mean = sum(half[mechanism][step][name] for half in halves) / 2
                assert mean == pytest.approx(value, rel=1e-4), (mechanism, step, name)
                assert halves[0][mechanism][step][name] != halves[1][mechanism][step][name]
