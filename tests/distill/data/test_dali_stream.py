"""What feeds DALI: on a thread of its own, without copies, and without work that is thrown away."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import distill.data.dali_graph
from distill.data.batch_plan import EvalPlan
from distill.data.dali import DaliLoader
from distill.data.dali_graph import HostBatch, build_pipeline, dali_decodes, feed
from distill.data.stream import Position
from tests.distill.data.conftest import MakeSplit, picture
from tests.distill.data.planting import BAD, encoded, raw_split
from tests.distill.data.test_loaders import CPU, KINDS, GraphLoader, evaluation, input_spec, needs_dali, same, train


@needs_dali
@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader])
def test_dali_is_fed_and_waited_for_beside_the_thread_that_trains(kind, make_split: MakeSplit):
    """On a GPU it was the training thread: milliseconds of each step in which it launched nothing."""
    loader = train(kind, make_split())
    threads: set[int] = set()
    take = loader._stream.take
    loader._stream.take = lambda position: (threads.add(threading.get_ident()), take(position))[1]
    list(loader.epoch(0))
    loader.close()
    assert threads
    assert threading.get_ident() not in threads


@needs_dali
def test_encoded_images_are_read_where_they_are():
    """A batch is some tens of MB; copying them in took 5 ms of a step, with the interpreter's lock held."""
    plan = EvalPlan(2, spec=input_spec(16, 16, 1.0), batch_size=1, rank=0, world_size=1)
    pipeline = build_pipeline(plan, CPU, 1, decode_only=True)
    grey = [np.frombuffer(bytearray(encoded(Image.new("L", (16, 16), level), "BMP")), np.uint8) for level in (10, 10, 200)]
    sizes = np.array([[16, 16]])
    for number in range(2):
        work = plan.work(Position(0, number), sizes, np.zeros(1, np.int64))
        feed(
            pipeline, plan, HostBatch([grey[number]], sizes, work, np.zeros(1, np.int64), np.array([number])), decode_only=True
        )
    grey[0][:] = grey[2]  # after it was fed, before it is decoded
    pipeline.schedule_run()
    images, *_ = pipeline.share_outputs()
    assert np.unique(np.array(images.as_tensor())).tolist() == [200]


@needs_dali
@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader])
def test_what_dali_reads_lives_as_long_as_the_pipeline_that_reads_it(kind, tmp_path: Path):
    """After a failure, a jump and the end: the pipeline goes first, then the encoded images of its runs in flight."""
    images = [encoded(picture(40, 44, seed=n), quality=90) for n in range(48)]
    for number in (3, 17):  # DALI's parser takes it, its decoder does not
        images[number] = BAD["damaged PNG"](images[number])
    loader = train(kind, raw_split(tmp_path / "split", images), faults={"max_bad_rate": 1.0})
    stream = loader._stream
    ended: list[bool] = []

    def watch() -> None:
        fed = [weakref.ref(batch) for _, batch in stream._in_flight]
        weakref.finalize(stream._pipeline, lambda: ended.append(all(ref() is not None for ref in fed)))

    build = stream._build
    stream._build = lambda: (watch(), build())
    batches = list(loader.epoch(0))
    assert len(ended) >= 1, "an image ended a pipeline"
    assert same([next(loader.epoch(0, 2))], [batches[2]])
    loader._ahead.close()
    watch()
    loader.close()
    assert all(ended)
    assert stream._pipeline is None


@needs_dali
def test_images_are_tried_by_one_pipeline_until_one_fails(monkeypatch: pytest.MonkeyPatch):
    """A pipeline for each took a tenth of a second on a GPU, half a minute for a batch."""
    images = [encoded(picture(40, 44, seed=n), "GIF" if n in (3, 4) else "JPEG") for n in range(8)]
    make, made = distill.data.dali_graph._one_image_pipeline, Counter()
    monkeypatch.setattr(distill.data.dali_graph, "_one_image_pipeline", lambda *options: (made.update("1"), make(*options))[1])
    assert dali_decodes([np.frombuffer(data, np.uint8) for data in images], CPU) == [n not in (3, 4) for n in range(8)]
    assert made.total() == 3


@needs_dali
@pytest.mark.parametrize("said", ["CUDA allocation failed", "cudaErrorMemoryAllocation (2): out of memory", "std::bad_alloc"])
def test_a_device_that_fails_is_not_taken_for_an_image_that_does(said: str, make_split: MakeSplit):
    loader = train(DaliLoader, make_split())
    position = Position(0, 0)
    with pytest.raises(RuntimeError, match=rf"DALI failed, and not by an image: .*{said[:4]}"):
        loader._stream._repaired(position, loader._stream._read(position), f"Error in mixed operator: {said}")
    loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_begins_with_what_the_one_before_left_ready(kind, make_split: MakeSplit, monkeypatch: pytest.MonkeyPatch):
    """Six batches were read, two of them decoded, for an epoch that nobody ever asked for."""
    loader = evaluation(kind, make_split(), spec=input_spec(32, 32, 0.875))
    wanted: Counter[int] = Counter()
    samples = loader.task.plan.samples
    loader.task.plan.samples = lambda position: (wanted.update([position.epoch]), samples(position))[1]
    first, *others = (list(loader.epoch(0)) for _ in range(3))
    assert all(same(batches, first) for batches in others)
    loader.close()
    assert set(wanted) == {0}
