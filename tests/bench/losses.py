"""The losses beside straightforward versions of the same maths (the references of the tests): time and memory, as ratios.

    python -m tests.bench.losses [--quick] [--json FILE] [--device cuda] [--threads N]

Both versions of a case run in turn in one process, forward and backward; the medians make the ratio. Seconds are CPU seconds
of the process, which on a busy machine say more than the clock; on a GPU the clock, with the device synchronised.
Peak extra memory is measured apart. On a CPU each version of a case runs once in a process of its own, after a run of a
tiny case has loaded what is loaded once: the resident set's high-water mark (VmHWM, reset before) less the resident set
before. There freed blocks go back to the system at once, and the figure is the peak of what was alive together: where the
allocator keeps them, it depends on the holes that earlier work has left. Seconds are taken the other way round, as a training
takes them: freed memory is kept, and getting it again page by page does not count. On a GPU memory is
torch.cuda.max_memory_allocated less what was allocated before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.command_line import Parser, command
from distill.config import RecipeError
from distill.losses.at import at_loss
from distill.losses.crd import crd_row_loss
from distill.losses.dist_kd import dist_loss
from distill.losses.fsp import fsp_matrix
from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.losses.memory_bank import crd_scores
from distill.losses.msdcrd import contrastive_loss
from distill.losses.nst import nst_loss
from distill.losses.pkt import pkt_loss
from distill.losses.reviewkd import hierarchical_loss
from distill.losses.rkd import rkd_angle_loss, rkd_distance_loss
from distill.losses.sdd import sdd_loss
from distill.losses.sp import sp_loss
from distill.losses.wcord import wcord_global_loss
from distill.losses.wkd_feature import wkd_feature_loss
from distill.losses.wkd_logit import transport_cost, wkd_logit_loss
from distill.regions import pool, pooling_matrix
from pipelines.measure.memory import CLEAR_PEAK, clear_peak, read_peak, status
from pipelines.setup.machine import M_MMAP_THRESHOLD, keep_freed_memory
from tests.distill.losses import references

CLASSES = 1000
GRID = 7
SCALES = (1, 2, 4)
REGIONS = sum(scale * scale for scale in SCALES)
TEMPERATURE = 4.0
SAMPLES, NEGATIVES = 50_000, 16_384
"""Of CRD's memory on CIFAR-100."""
SMALLEST_TOLD_BYTES = 4 * 2**20
"""The kernel counts a process's pages in batches, and the allocator keeps some: smaller peaks are noise."""


@dataclass(frozen=True)
class Case:
    """One loss at one size; `width` is the number of channels, 0 where there are none."""

    loss: str
    batch: int
    width: int = 0


class Versions(NamedTuple):
    """The same loss computed by this project and straightforwardly, of the same tensors."""

    ours: Callable[[], Tensor]
    reference: Callable[[], Tensor]
    leaf: Tensor
    """The tensor that takes the gradient."""


class Figures(NamedTuple):
    """The measurements of one case; bytes are None where the system does not tell."""

    ours_seconds: float
    reference_seconds: float
    ours_bytes: int | None
    reference_bytes: int | None
    relative_difference: float
    """Difference of the two values: the versions compute the same."""


def cases(quick: bool) -> list[Case]:
    """B = 64 and 256, D = 512 and 2048, where SIZES has no others; the first of each when quick."""
    found = []
    for loss in BUILDERS:
        batches, widths = SIZES.get(loss, ((64, 256), (0,) if loss in LOGIT_LOSSES else (512, 2048)))
        found += [Case(loss, batch, width) for batch in batches for width in widths][: 1 if quick else None]
    return found


def make(case: Case, device: torch.device) -> Versions:
    """The tensors of a case and both versions over them."""
    torch.manual_seed(0)
    return BUILDERS[case.loss](case, device)


def _logits(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = (2 * torch.randn(*shape, CLASSES, device=device) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(CLASSES, shape[:1], device=device)


def _kd(case: Case, device: torch.device) -> Versions:
    student, teacher, _ = _logits((case.batch,), device)
    return Versions(
        lambda: kd_loss(student, teacher, TEMPERATURE).mean(),
        lambda: references.kd(student, teacher, TEMPERATURE).mean(),
        student,
    )


def _dkd(case: Case, device: torch.device) -> Versions:
    student, teacher, labels = _logits((case.batch,), device)
    return Versions(
        lambda: dkd_loss(student, teacher, labels, 1.0, 8.0, TEMPERATURE).mean(),
        lambda: references.dkd(student, teacher, labels, 1.0, 8.0, TEMPERATURE).mean(),
        student,
    )


def _nkd(case: Case, device: torch.device) -> Versions:
    student, teacher, labels = _logits((case.batch,), device)
    return Versions(
        lambda: nkd_loss(student, teacher, labels, 1.5, TEMPERATURE).mean(),
        lambda: references.nkd(student, teacher, labels, 1.5, TEMPERATURE).mean(),
        student,
    )


def _sdd(base: str) -> Callable[[Case, torch.device], Versions]:
    """SDD on region logits [B, 21, K]; the head that makes them is the model's."""

    def build(case: Case, device: torch.device) -> Versions:
        """Both versions over the base `base`."""
        student, teacher, labels = _logits((case.batch, REGIONS), device)
        own = labels[:, None].expand(-1, REGIONS)
        options = {"temperature": TEMPERATURE}

        def reference() -> Tensor:
            if base == "kd":
                rows = references.kd(student, teacher, TEMPERATURE)
            elif base == "dkd":
                rows = references.dkd(student, teacher, own, 1.0, 8.0, TEMPERATURE)
            else:
                rows = references.nkd(student, teacher, own, 1.5, TEMPERATURE)
            return references.sdd(rows, teacher, labels)

        return Versions(lambda: sdd_loss(student, teacher, labels, base, base_options=options), reference, student)

    return build


def _contrast(case: Case, device: torch.device) -> Versions:
    """The contrast of B x 21 region vectors."""
    rows = case.batch * REGIONS
    student, teacher = torch.randn(2, rows, case.width, device=device)
    categories = torch.randint(CLASSES, (rows,), device=device)
    student.requires_grad_()
    return Versions(
        lambda: contrastive_loss(student, teacher, categories),
        lambda: references.contrast(student, teacher, categories),
        student,
    )


def _pool(case: Case, device: torch.device) -> Versions:
    """A 7 x 7 map to its 21 regions; the mean of squares stands for a loss."""
    feature_map = torch.randn(case.batch, case.width, GRID, GRID, device=device).requires_grad_()
    matrix = pooling_matrix(GRID, GRID, SCALES, "adaptive").to(feature_map)
    return Versions(
        lambda: pool(feature_map, matrix).square().mean(),
        lambda: _adaptive_regions(feature_map).square().mean(),
        feature_map,
    )


def _msdcrd(case: Case, device: torch.device) -> Versions:
    """Pooling and contrast of one stage, from the student's projected map and the teacher's."""
    maps = torch.randn(2, case.batch, case.width, GRID, GRID, device=device)
    student, teacher = maps[0].clone().requires_grad_(), maps[1].clone()
    categories = torch.randint(CLASSES, (case.batch * REGIONS,), device=device)
    matrix = pooling_matrix(GRID, GRID, SCALES, "adaptive").to(student)

    def ours() -> Tensor:
        return contrastive_loss(pool(student, matrix).flatten(0, 1), pool(teacher, matrix).flatten(0, 1), categories)

    def reference() -> Tensor:
        return references.contrast(
            _adaptive_regions(student).flatten(0, 1), _adaptive_regions(teacher).flatten(0, 1), categories
        )

    return Versions(ours, reference, student)


def _adaptive_regions(feature_map: Tensor) -> Tensor:
    """One adaptive pooling per scale, [B, R, C]."""
    return torch.cat([F.adaptive_avg_pool2d(feature_map, scale).flatten(2) for scale in SCALES], dim=2).transpose(1, 2)


def _two(kind: str, ours: Callable, reference: Callable) -> Callable[[Case, torch.device], Versions]:
    """A loss of the student's and the teacher's maps behind a ReLU, embeddings or logits, of one shape."""

    def build(case: Case, device: torch.device) -> Versions:
        """Both versions of the same tensors."""
        shape = {"maps": (case.width, GRID, GRID), "rows": (case.width,), "logits": (CLASSES,)}[kind]
        student, teacher = (torch.randn(case.batch, *shape, device=device) for _ in range(2))
        if kind == "maps":
            student, teacher = student.relu(), teacher.relu()
        student.requires_grad_()
        return Versions(lambda: ours(student, teacher), lambda: reference(student, teacher), student)

    return build


def _rkd(student: Tensor, teacher: Tensor) -> Tensor:
    return 25 * rkd_distance_loss(student, teacher).mean() + 50 * rkd_angle_loss(student, teacher).mean()


def _wkd_feature(student: Tensor, teacher: Tensor) -> Tensor:
    means, deviations = wkd_feature_loss(student, teacher)
    return (2 * means + deviations).mean()


def _wkd_logit(case: Case, device: torch.device) -> Versions:
    """Classes that are equally far from each other."""
    student, teacher, labels = _logits((case.batch,), device)
    cost = transport_cost(1 - torch.eye(CLASSES, device=device))
    return Versions(
        lambda: wkd_logit_loss(student, teacher, labels, cost).mean(),
        lambda: references.wkd_logit(student, teacher, labels, cost),
        student,
    )


def _ctkd(case: Case, device: torch.device) -> Versions:
    """KD at a temperature that takes a gradient."""
    student, teacher, _ = _logits((case.batch,), device)
    temperature = torch.tensor([TEMPERATURE], device=device, requires_grad=True)
    return Versions(
        lambda: kd_loss(student, teacher, temperature).mean(),
        lambda: references.kd(student, teacher, temperature).mean(),
        student,
    )


def _memory(row_loss: Callable[[Tensor, Tensor | float, int], Tensor]) -> Callable[[Case, torch.device], Versions]:
    """One side's scores against a bank of CIFAR-100's size and the loss of them."""

    def build(case: Case, device: torch.device) -> Versions:
        """Both ways to the scores."""
        bank = F.normalize(torch.randn(SAMPLES, case.width, device=device), dim=1)
        embeddings = F.normalize(torch.randn(case.batch, case.width, device=device), dim=1).requires_grad_()
        ids = torch.randint(SAMPLES, (case.batch, 1 + NEGATIVES), device=device)
        normaliser = 2.0 * SAMPLES

        def loss(scores: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
            return row_loss(scores(embeddings, bank, ids), normaliser, SAMPLES).mean()

        return Versions(lambda: loss(crd_scores), lambda: loss(references.memory_scores), embeddings)

    return build


LOGIT_LOSSES = {
    "kd": _kd,
    "dkd": _dkd,
    "nkd": _nkd,
    "sdd over kd": _sdd("kd"),
    "sdd over dkd": _sdd("dkd"),
    "sdd over nkd": _sdd("nkd"),
}
MAP_LOSSES = {"pooling": _pool, "contrast": _contrast, "msdcrd": _msdcrd}


def _fsp(student: Tensor, teacher: Tensor) -> Tensor:
    return (fsp_matrix(student, student) - fsp_matrix(teacher, teacher)).square().mean()


METHODS = {
    "ctkd": _ctkd,
    "at": _two("maps", lambda student, teacher: at_loss(student, teacher).mean(), references.at),
    "sp": _two("maps", lambda student, teacher: sp_loss(student, teacher).mean(), references.sp),
    "nst": _two("maps", lambda student, teacher: nst_loss(student, teacher).mean(), references.nst),
    "fsp, one matrix": _two("maps", _fsp, references.fsp),
    "pkt": _two("rows", lambda student, teacher: pkt_loss(student, teacher).mean(), references.pkt),
    "rkd": _two("rows", _rkd, references.rkd),
    "dist": _two("logits", lambda student, teacher: dist_loss(student, teacher)[0], references.dist),
    "crd": _memory(crd_row_loss),
    "wcord, over the memory": _memory(wcord_global_loss),
    "wkd_logit": _wkd_logit,
    "wkd_feature, after the projector": _two("maps", _wkd_feature, references.wkd_feature),
    "reviewkd, one level after its block": _two(
        "maps", lambda student, teacher: hierarchical_loss(student, teacher).mean(), references.hierarchical
    ),
}
"""The methods that the papers' two are compared with, or the part of each that differs from the plain formula."""
BUILDERS = {**LOGIT_LOSSES, **MAP_LOSSES, **METHODS}
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "ctkd": ((64, 256), (0,)),
    "dist": ((64, 256), (0,)),
    # the plain version holds several tensors of B x B x D numbers, or of B x K x K, of B x C x C x 49, or of B x 16,385 x D
    "rkd": ((64,), (512, 2048)),
    "nst": ((16,), (128,)),
    "fsp, one matrix": ((16,), (128,)),
    "wkd_logit": ((4,), (0,)),
    "crd": ((16, 64), (128,)),
    "wcord, over the memory": ((16,), (128,)),
}
"""Batches and widths of what is not measured at the usual ones."""
IS_PLAIN = {
    "cross_entropy": "PyTorch's own operator",
    "fitnet": "convolution, BatchNorm and ReLU, then a mean of squares",
    "cat_kd": "a mean of squares of logits that the model's head makes",
    "mlkd": "kd's divergences, and the images' and the classes' products of softmaxes",
    "mgd": "a mask and two convolutions, then a sum of squares",
    "ofd": "convolution and BatchNorm of each stage, then a sum of squares under a mask",
    "simkd": "a mean of squares; the projector is the student's",
    "semckd": "a regressor for each pair of stages, then means of squares",
    "vid": "three convolutions of each stage, then a mean of squares over variances",
    "cc": "two linear layers, then products of neighbours",
    "srrl": "a linear layer and BatchNorm, then two means of squares",
    "ab": "convolution and BatchNorm of each stage, then a sum of squares",
    "ft": "convolutions, then a mean of distances of norms",
}
"""Losses whose code is the plain version, with what it is."""


def run_once(loss: Callable[[], Tensor], leaf: Tensor) -> float:
    """One forward and backward; the value."""
    leaf.grad = None
    value = loss()
    value.backward()
    return value.item()


def seconds_of(versions: Versions, budget: float, device: torch.device) -> tuple[float, float]:
    """Median seconds of ours and of the reference, in turn until both have used the budget, five times at least."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    taken: tuple[list[float], list[float]] = ([], [])
    for loss in versions[:2]:
        run_once(loss, versions.leaf)
    while len(taken[0]) < 5 or (sum(taken[0]) + sum(taken[1]) < budget and len(taken[0]) < 200):
        for loss, times in zip(versions[:2], taken, strict=True):
            start = clock()
            run_once(loss, versions.leaf)  # reads the value, which waits for a GPU
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - start)
    return statistics.median(taken[0]), statistics.median(taken[1])


def peak_extra_bytes(case: Case, version: str, device: torch.device, threads: int) -> int | None:
    """Peak memory of one forward and backward beyond what was held before it; None where the system does not tell."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        _give_freed_memory_back()
    warm = make(Case(case.loss, 2, min(case.width, 8)), device)
    run_once(getattr(warm, version), warm.leaf)
    versions = make(case, device)
    loss: Callable[[], Tensor] = getattr(versions, version)
    del warm
    gc.collect()
    if device.type == "cpu" and not CLEAR_PEAK.exists():
        return None
    clear_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else status("VmRSS")
    run_once(loss, versions.leaf)
    return read_peak(device) - before


def _give_freed_memory_back() -> None:
    """Lets glibc give every block of 64 KiB or more back to the system when it is freed, and all that it holds free now."""
    with suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**16)
        library.malloc_trim(0)


def measure(case: Case, device: torch.device, threads: int, budget: float) -> Figures:
    """Time in this process, memory in processes of their own."""
    keep_freed_memory()
    versions = make(case, device)
    values = [run_once(loss, versions.leaf) for loss in versions[:2]]
    difference = abs(values[0] - values[1]) / abs(values[1])
    seconds = seconds_of(versions, budget, device)
    del versions
    if device.type == "cuda":
        peaks = [peak_extra_bytes(case, version, device, threads) for version in ("ours", "reference")]
    else:
        peaks = [_in_own_process(case, version, threads) for version in ("ours", "reference")]
    return Figures(seconds[0], seconds[1], peaks[0], peaks[1], difference)


def _in_own_process(case: Case, version: str, threads: int) -> int | None:
    context = multiprocessing.get_context("forkserver")
    # imported once, run nowhere before the measurement
    context.set_forkserver_preload(["torch", "distill.losses", "pipelines.measure.memory"])
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(peak_extra_bytes, case, version, torch.device("cpu"), threads).result()


def memory_ratio(figures: Figures) -> float | None:
    """Ours over the reference's peak; None where it is not known or too small for the system's own resolution."""
    if figures.ours_bytes is None or figures.reference_bytes is None or figures.reference_bytes < SMALLEST_TOLD_BYTES:
        return None
    return figures.ours_bytes / figures.reference_bytes


def line(case: Case, figures: Figures) -> str:
    """One row of the table, in Markdown."""
    size = f"B {case.batch}" + (f", D {case.width}" if case.width else "")
    times = f"{figures.ours_seconds:.4f} / {figures.reference_seconds:.4f}"
    ratio = memory_ratio(figures)
    memory, share = "not measured", ""
    if figures.ours_bytes is not None and figures.reference_bytes is not None:
        memory = f"{figures.ours_bytes / 2**20:.1f} / {figures.reference_bytes / 2**20:.1f}"
        share = "too small to tell" if ratio is None else f"{ratio:.2f}"
    return (
        f"| {case.loss} | {size} | {times} | {figures.ours_seconds / figures.reference_seconds:.2f} | {memory} | {share} |"
        f" {figures.relative_difference:.0e} |"
    )


HEADER = """| loss | size | seconds, ours / reference | ratio | peak extra MiB, ours / reference | ratio | values differ by |
|---|---|---|---|---|---|---|"""


def report(found: list[tuple[Case, Figures]], device: torch.device, threads: int) -> dict:
    """The content of the JSON file."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "classes": CLASSES,
        "regions": REGIONS,
        "memory": "torch.cuda.max_memory_allocated" if device.type == "cuda" else "VmHWM less VmRSS before, own process",
        "cases": [
            {
                **asdict(case),
                **figures._asdict(),
                "time_ratio": figures.ours_seconds / figures.reference_seconds,
                "memory_ratio": memory_ratio(figures),
            }
            for case, figures in found
        ],
    }


@command
def main(argv: Sequence[str]) -> None:
    """Measures, prints the table as it grows, writes the JSON."""
    parser = Parser(prog="python -m tests.bench.losses", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="B = 64 and D = 512 only, less time per case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--loss", action="append", choices=list(BUILDERS), help="only this one; may be repeated")
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"--device {arguments.device}: PyTorch finds no GPU here; leave it out")
    device = torch.device(arguments.device)
    torch.set_num_threads(arguments.threads)
    print(HEADER, flush=True)
    found = []
    for case in cases(arguments.quick):
        if not arguments.loss or case.loss in arguments.loss:
            found.append((case, measure(case, device, arguments.threads, budget=2.0 if arguments.quick else 10.0)))
            print(line(*found[-1]), flush=True)
    if not arguments.loss:
        print("\n".join(f"| {name} | | is the plain version: {what} | | | | |" for name, what in IS_PLAIN.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(report(found, device, arguments.threads), indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
