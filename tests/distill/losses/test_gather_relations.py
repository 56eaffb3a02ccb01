"""Relations over the images of all processes: the mean over real ranks is the loss of the joined batch, gradients too."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from distill.protocols import ModelOutput, Regions, Target
from tests.distill.losses.outputs import made
from tests.distill.losses.relations import rows

REGIONS = Regions((1, 2), "area")
CRITERIA = {
    "sp": ("sp", {}),
    "sp over regions": ("sp", {"scales": (1, 2)}),
    "sp, regions as one vector": ("sp", {"scales": (1, 2), "reading": "vector"}),
    "sp, regions as rows": ("sp", {"scales": (1, 2), "reading": "rows"}),
    "pkt": ("pkt", {}),
    "rkd": ("rkd", {}),
    "dist": ("dist", {"temperature": 2.0}),
}
BATCH = 8


def output(seed: int, part: slice) -> ModelOutput:
    """Some images of a joined batch that every process can make; the tensors are leaves."""
    found = [rows(BATCH, *shape, seed=seed)[part].clone().requires_grad_() for shape in ((6,), (5, 3, 3), (5, 4), (7,))]
    return ModelOutput(found[0], found[1], {}, {REGIONS: found[2]}, {}, embedding=found[3])


def losses(part: slice, gather: bool) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Each criterion's loss of these images, and the gradients of the student's tensors."""
    found = {}
    for name, (loss, options) in CRITERIA.items():
        student, teacher = output(1, part), output(2, part)
        value, _ = made(loss, gather=gather, **options)(student, teacher, Target(torch.zeros(BATCH).long()))
        value.backward()
        leaves = [student.logits, student.feature_map, student.region_features[REGIONS], student.embedding]
        found[name] = (value.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None])
    return found


def one_rank(rank: int, world: int, folder: str) -> None:
    """What each process does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    share = BATCH // world
    torch.save((dist.get_world_size(), losses(slice(rank * share, (rank + 1) * share), gather=True)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The losses that two real processes found, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "distill.losses"])
    processes = [context.Process(target=one_rank, args=(rank, 2, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert [world for world, _ in found] == [2, 2]
    return [each for _, each in found]


@pytest.mark.parametrize("name", CRITERIA)
def test_mean_over_ranks_is_the_loss_of_the_joined_batch(ranks, name):
    value, gradients = losses(slice(None), gather=False)[name]
    assert gradients
    torch.testing.assert_close(torch.stack([each[name][0] for each in ranks]).mean(), value, rtol=1e-12, atol=0)
    for number, gradient in enumerate(gradients):
        # what DDP's averaging of the parameters' gradients makes of them
        joined = torch.cat([each[name][1][number] for each in ranks]) / 2
        assert (joined - gradient).abs().max() <= 1e-12 * gradient.abs().max()


@pytest.mark.parametrize("name", CRITERIA)
def test_without_gathering_half_a_batch_is_another_loss(ranks, name):
    halves = [losses(part, gather=False)[name][0] for part in (slice(0, 4), slice(4, 8))]
    assert (torch.stack(halves).mean() - ranks[0][name][0]).abs() > 1e-3 * ranks[0][name][0]


@pytest.mark.parametrize("name", CRITERIA)
def test_gathering_without_a_process_group_is_the_local_loss(name):
    assert losses(slice(0, 4), gather=True)[name][0] == losses(slice(0, 4), gather=False)[name][0]
