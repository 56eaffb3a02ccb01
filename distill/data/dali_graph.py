"""DALI's graph of a plan, and how it is fed. The only file that imports DALI.

The graph has no random state and no reader: bytes, windows and flips come in from the plan (`plan.py`), so a position of the
stream can be produced at any time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data.augment.dali_ops import add_layer, mirrored, resize
from distill.data.augment.policy import affine_matrices
from distill.data.batch_plan import Plan, Work

IN_FLIGHT = 2
"""Batches inside DALI; its `prefetch_queue_depth`."""

DecodeMode = Literal["whole", "window", "host"]
"""How a window of an image comes onto the device: `whole` decodes the image there and cuts the window out, `window` decodes no
more than the window, `host` decodes the window on the CPU and copies it."""


def default_mode(device: torch.device) -> DecodeMode:
    """`window` on a CPU, where it saves work; `whole` on a GPU, where nvJPEG's windows are slow or crash (`decoding.py`)."""
    return "whole" if device.type == "cuda" else "window"


def dali_available() -> bool:
    """Whether DALI is installed here; nothing else in the project needs it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no `nvidia` namespace at all
        return False


def dali_version() -> tuple[str, int] | None:
    """The installed DALI's version and the CUDA it is built for, as 12986 for 12.9; None where it cannot be imported."""
    try:
        import nvidia.dali
    except ImportError:
        return None
    return nvidia.dali.__version__, int(nvidia.dali.__cuda_version__)


@dataclass(frozen=True)
class HostBatch:
    """A batch as DALI is fed with it: encoded images, their sizes int64 [B, 2] as the index says, what to do with each, labels
    and samples int64 [B]; and what does not go through DALI, a teacher cache's rows."""

    encoded: list[NDArray[np.uint8]]
    sizes: NDArray[np.int64]
    work: Work
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    teacher: Tensor | None = None


def decoded(modules: Any, encoded: Any, start: Any, shape: Any, mode: DecodeMode, device: torch.device) -> Any:
    """The windows (`start`, `shape`) of the encoded images as RGB on the device, with the CPU's chroma upsampling everywhere.

    EXIF rotation is not applied.
    """
    fn, on_gpu = modules.fn, device.type == "cuda"
    decoder = "mixed" if on_gpu and mode != "host" else "cpu"
    options = {"output_type": modules.types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if mode == "whole":
        return fn.slice(fn.decoders.image(encoded, device=decoder, **options), start=start, shape=shape, axes=(0, 1))
    windows = fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), device=decoder, **options)
    return windows.gpu() if on_gpu and mode == "host" else windows


def build_pipeline(
    plan: Plan, device: torch.device, num_threads: int, decode_only: bool, mode: DecodeMode | None = None
) -> Any:
    """The DALI pipeline: decode a window, and unless `decode_only` resize, slice (black outside), flip, layers -> uint8 HWC
    each, labels, samples, and the shape that each whole image has by its header. mode: None is `default_mode`."""
    from nvidia.dali import fn, math, pipeline_def, types

    modules = SimpleNamespace(fn=fn, math=math, types=types)

    def source(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    def transformed(images: Any) -> Any:
        """All that comes after decoding."""
        if plan.resizes:
            size = source("resized", types.FLOAT, 1) if plan.slices else plan.size
            images = resize(modules, images, size, plan.interpolation)
        if plan.mirrored:
            images = mirrored(modules, images, plan.mirrored)
        if plan.slices:
            anchor = source("anchor", types.INT32, 1)
            images = fn.slice(images, start=anchor, shape=plan.size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
        images = fn.flip(images, horizontal=source("flip", types.INT32, 0))
        for layer in range(plan.num_layers):
            operation = source(f"operation{layer}", types.INT32, 0)
            argument = source(f"argument{layer}", types.FLOAT, 0)
            images = add_layer(modules, images, operation, argument, source(f"matrix{layer}", types.FLOAT, 2), plan.fill)
        return images

    @pipeline_def(enable_conditionals=plan.num_layers > 0)
    def graph() -> Any:
        """Images, labels, samples and shapes of a batch."""
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)  # tens of MB a batch
        start, shape = source("window_start", types.INT32, 1), source("window_shape", types.INT32, 1)
        images = decoded(modules, encoded, start, shape, mode or default_mode(device), device)
        if not decode_only:
            images = transformed(images)
        shapes = fn.peek_image_shape(encoded, adjust_orientation=False)
        return images, source("labels", types.INT64, 0), source("samples", types.INT64, 0), shapes

    pipeline = graph(
        batch_size=plan.batch_size, num_threads=num_threads, device_id=gpu_number(device), prefetch_queue_depth=IN_FLIGHT
    )
    pipeline.build()
    return pipeline


def feed(pipeline: Any, plan: Plan, batch: HostBatch, decode_only: bool) -> None:
    """Hands one batch to every input that the graph of `plan` has.

    Encoded images are read where they are: `batch` must live until its outputs are there, or the pipeline is gone.
    """
    work = batch.work
    pipeline.feed_input("labels", batch.labels)
    pipeline.feed_input("samples", batch.samples)
    pipeline.feed_input("encoded", batch.encoded)
    pipeline.feed_input("window_start", work.windows[:, :2].astype(np.int32))
    pipeline.feed_input("window_shape", work.windows[:, 2:].astype(np.int32))
    if decode_only:
        return
    if plan.resizes and plan.slices:
        pipeline.feed_input("resized", work.resized.astype(np.float32))
    if plan.slices:
        pipeline.feed_input("anchor", (work.anchors + plan.mirrored).astype(np.int32))
    pipeline.feed_input("flip", work.flips)
    for layer in range(plan.num_layers):
        operations, arguments = work.operations[:, layer], work.arguments[:, layer]
        pipeline.feed_input(f"operation{layer}", np.ascontiguousarray(operations))
        pipeline.feed_input(f"argument{layer}", np.ascontiguousarray(arguments))
        matrices = affine_matrices(operations, arguments, plan.size)
        pipeline.feed_input(f"matrix{layer}", matrices.astype(np.float32))


def check_sizes(shapes: Any, batch: HostBatch) -> None:
    """Raises RuntimeError, as a failed run does, where an image has not the size of the index: its window is a wrong one.

    shapes: DALI's tensors [B, 3] of `peek_image_shape`.
    """
    if not np.array_equal(np.array(shapes.as_tensor())[:, :2], batch.sizes):
        raise RuntimeError("an image has another size than the index says")


def dali_parses(data: NDArray[np.uint8], size: Sequence[int]) -> bool:
    """Whether DALI's parser takes this encoded image to have this (height, width); costs 3 us. DALI must see no other image:
    where one of many does not parse, its threads go on with memory that is gone (SIGSEGV)."""
    try:
        from nvidia import nvimgcodec
    except ImportError:  # DALI's own copy, without the wheel that it depends on: nobody can tell
        return True
    try:
        stream = nvimgcodec.CodeStream(data)
        return (stream.height, stream.width) == tuple(size)
    except RuntimeError:
        return False


def dali_decodes(images: Sequence[NDArray[np.uint8]], device: torch.device, mode: DecodeMode | None = None) -> list[bool]:
    """Whether DALI decodes each of these images, uint8 [size], alone. One pipeline serves all up to the next that fails: a
    pipeline of a GPU takes a tenth of a second and tens of MB. mode: None is `default_mode`."""
    pipeline: Any = None
    found = []
    for data in images:
        pipeline = pipeline or _one_image_pipeline(device, mode)
        pipeline.feed_input("encoded", [data])
        try:
            pipeline.run()
        except RuntimeError:
            pipeline = None
        found.append(pipeline is not None)
    return found


def _one_image_pipeline(device: torch.device, mode: DecodeMode | None) -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=gpu_number(device), prefetch_queue_depth=1)
    with pipeline:
        source = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        on = "mixed" if device.type == "cuda" and mode != "host" else "cpu"
        pipeline.set_outputs(
            fn.decoders.image(source, device=on, adjust_orientation=False),
            fn.peek_image_shape(source, adjust_orientation=False),
        )
    pipeline.build()
    return pipeline


def gpu_number(device: torch.device) -> int | None:
    """DALI's `device_id`: None is its CPU backend."""
    if device.type != "cuda":
        return None
    return device.index if device.index is not None else torch.cuda.current_device()
