"""Batches that are on the device, or on their way there, before they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from distill.protocols import Batch

Item = TypeVar("Item")


class _Sent(NamedTuple):
    batch: Batch
    arrived: torch.cuda.Event


def prefetched(batches: Iterator[Batch], stream: torch.cuda.Stream | None) -> Iterator[Batch]:
    """The same batches on the device of `stream`, in order, each fetched and sent one ahead; without one, `batches` itself.

    Whatever `batches` does on a GPU runs on that stream, so that a copy, or a host that waits for one, is not queued behind the
    training step. What lies in host memory is pinned and copied without waiting.
    """
    if stream is None:
        return batches
    return (_received(each, stream.device) for each in one_ahead(_sent(batches, stream)))


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each once its successor has been fetched; an exception comes in its own turn, after all before it."""
    held: list[Item] = []
    ended: Exception | None = None
    while ended is None:
        try:
            held.append(next(items))
        except Exception as error:  # also StopIteration: the end is one of the things that come in their turn
            ended = error
        if held and (ended is not None or len(held) > 1):
            yield held.pop(0)
    if not isinstance(ended, StopIteration):
        raise ended


def _sent(batches: Iterator[Batch], stream: torch.cuda.Stream) -> Iterator[_Sent]:
    while True:
        with torch.cuda.stream(stream):  # left before every yield: the consumer's stream is its own business
            batch = next(batches, None)
            if batch is None:
                return
            batch = Batch(*(None if t is None else _to(t, stream.device) for t in batch))  # type: ignore[arg-type]
            arrived = torch.cuda.Event()
            arrived.record()
        yield _Sent(batch, arrived)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if tensor.device.type == "cpu" else tensor


def _received(sent: _Sent, device: torch.device) -> Batch:
    """The batch, for the current stream: it waits for the copy, and the memory is its to read until it is through with it."""
    current = torch.cuda.current_stream(device)
    current.wait_event(sent.arrived)
    for tensor in sent.batch:
        if tensor is not None:
            tensor.record_stream(current)
    return sent.batch
