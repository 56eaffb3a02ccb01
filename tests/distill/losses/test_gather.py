"""Negatives from every process: the mean over real ranks is the loss of the joined batch, and so are the gradients."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill.losses.msdcrd import contrastive_loss
from tests.distill.losses.golden import assert_matches, cases, vectors

OPTIONS = ({}, {"form": "eq12"}, {"mask_same_category": False}, {"temperature": 0.01, "chunk_rows": 3})


def joined_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """24 rows that every process can make: student, teacher, categories."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 24, 6, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(4, (24,), generator=generator)


def golden_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The golden sharded case as rows."""
    data = vectors("msdcrd", next(case for case in cases("msdcrd", "cases") if case["name"].startswith("sharded")))
    return data["student"].double().flatten(0, 1), data["teacher"].double().flatten(0, 1), data["category"].flatten()


def shard_loss(batch: tuple[torch.Tensor, ...], options: dict) -> dict[str, torch.Tensor]:
    """This rank's share of the batch: its loss, and the gradient of its own rows."""
    student, teacher, categories = (whole.chunk(dist.get_world_size())[dist.get_rank()] for whole in batch)
    student = student.clone().requires_grad_()
    loss = contrastive_loss(student, teacher, categories, gather=True, **options)
    loss.backward()
    return {"loss": loss.detach(), "gradient": student.grad}


def uneven_message() -> str:
    """What a rank is told when ranks bring different numbers of rows."""
    rows = 50 + dist.get_rank()
    try:
        contrastive_loss(torch.ones(rows, 2), torch.ones(rows, 2), torch.arange(rows), gather=True)
    except ValueError as error:
        return str(error)
    return ""


def one_rank(rank: int, world: int, folder: str) -> None:
    """What each process does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    found = {"world": dist.get_world_size(), "rank": dist.get_rank()}
    found["golden"] = shard_loss(golden_batch(), {})
    found["random"] = [shard_loss(joined_batch(), options) for options in OPTIONS]
    found["uneven"] = uneven_message()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(world: int, folder: Path) -> list[dict]:
    """Runs `one_rank` in that many real processes; their results in rank order."""
    # the server imports torch once; what it forks has no threads of ours and no state of this process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "distill.losses.msdcrd"])
    processes = [context.Process(target=one_rank, args=(rank, world, str(folder))) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("world", [2, 4])
def test_mean_over_ranks_is_the_loss_of_the_joined_batch(world: int, tmp_path: Path):
    ranks = run_ranks(world, tmp_path)
    assert [found["world"] for found in ranks] == [world] * world
    assert all(f"ranks bring {list(range(50, 50 + world))} rows" in found["uneven"] for found in ranks)
    assert [found["rank"] for found in ranks] == list(range(world))
    _check_golden(world, [found["golden"] for found in ranks])
    for number, options in enumerate(OPTIONS):
        student, teacher, categories = joined_batch()
        student.requires_grad_()
        loss = contrastive_loss(student, teacher, categories, **options)
        loss.backward()
        shards = [found["random"][number] for found in ranks]
        torch.testing.assert_close(torch.stack([shard["loss"] for shard in shards]).mean(), loss.detach(), rtol=1e-12, atol=0)
        # what DDP's averaging of the parameters' gradients makes of them
        joined = torch.cat([shard["gradient"] for shard in shards]) / world
        assert (joined - student.grad).abs().max() <= 1e-12 * student.grad.abs().max()


def _check_golden(world: int, shards: list[dict[str, torch.Tensor]]) -> None:
    data = vectors("msdcrd", next(case for case in cases("msdcrd", "cases") if case["name"].startswith("sharded")))
    assert_matches(torch.stack([shard["loss"] for shard in shards]), data[f"ranks{world}_gathered_loss_log"], torch.float64)
    gradient = torch.cat([shard["gradient"] for shard in shards]).view_as(data["student"])
    assert_matches(gradient, data[f"ranks{world}_gathered_grad_log"], torch.float64)
    assert_matches(gradient / world, data["grad_log"], torch.float64)


def test_gathering_without_a_process_group_is_the_local_loss():
    student, teacher, categories = joined_batch()
    assert not dist.is_initialized()
    local = contrastive_loss(student, teacher, categories)
    assert contrastive_loss(student, teacher, categories, gather=True) == local
