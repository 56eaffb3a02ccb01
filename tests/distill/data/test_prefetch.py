"""Batches one ahead: in order, each once, errors in their own turn; on a CPU nothing at all; on a GPU the same batches."""

from collections.abc import Iterator

import pytest
import torch

from distill.data.prefetch import one_ahead, prefetched
from distill.protocols import Batch


def batches(count: int, fails_at: int | None = None) -> Iterator[Batch]:
    for number in range(count):
        if number == fails_at:
            raise RuntimeError(f"batch {number} is lost")
        generator = torch.Generator().manual_seed(number)
        images = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=generator)
        yield Batch(images, torch.full((8,), number), torch.arange(8) + 8 * number)


def test_on_a_cpu_it_is_the_iterator_itself():
    stream = batches(2)
    assert prefetched(stream, None) is stream


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_comes_once_in_order(count: int):
    assert list(one_ahead(iter(range(count)))) == list(range(count))


def test_one_more_is_fetched_than_is_used():
    fetched = []
    stream = one_ahead(fetched.append(number) or number for number in range(5))
    assert fetched == []
    assert next(stream) == 0
    assert fetched == [0, 1]
    assert next(stream) == 1
    assert fetched == [0, 1, 2]


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_an_error_comes_in_its_own_turn(fails_at: int):
    stream = one_ahead(batches(5, fails_at))
    for number in range(fails_at):
        assert next(stream).labels[0] == number
    with pytest.raises(RuntimeError, match=f"batch {fails_at} is lost"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="streams need a GPU")
def test_on_a_gpu_the_same_batches_arrive_while_the_device_is_busy():
    device = torch.device("cuda")
    busy = torch.randn(2048, 2048, device=device)
    before = torch.cuda.current_stream(device)
    sums = []
    for batch in prefetched(batches(9), torch.cuda.Stream(device)):
        assert torch.cuda.current_stream(device) == before
        assert {tensor.device.type for tensor in batch} == {"cuda"}
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        sums.append((batch.images.long().sum(), batch.labels.clone(), batch.sample_ids.clone()))
    assert len(sums) == 9
    for (total, labels, ids), wanted in zip(sums, batches(9), strict=True):
        assert total.item() == wanted.images.long().sum()
        assert torch.equal(labels.cpu(), wanted.labels)
        assert torch.equal(ids.cpu(), wanted.sample_ids)
