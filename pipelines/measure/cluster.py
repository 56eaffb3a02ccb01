"""The model of a cluster: the step of many GPUs from the measured step of one (docs/performance.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.measure.report import Report
from pipelines.measure.timeline import ALL_REDUCE, BACKWARD, DATA

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes after which DDP closes its first gradient bucket and every later one."""
COUNTS = 0.05
"""The least share of a step for which something is called the bottleneck."""


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes, in bytes, bytes per second and seconds."""

    gpus_per_node: int
    network: float
    """Bandwidth of a node to the others, one direction."""
    inside: float
    """Bandwidth of a GPU to the others of its node."""
    latency: float
    """Seconds that a message between two GPUs takes, however short it is."""
    disk: float
    """Bandwidth of a node's disk, or of its share of a common one."""
    memory: float
    """Memory of one GPU."""
    loader: float
    """Decoding threads of a GPU's process, as a multiple of those in the ledger."""

    def bandwidth(self, gpus: int) -> float:
        """Bytes per second of a ring through so many GPUs: its slowest link, which all of a node's traffic crosses."""
        return self.inside if gpus <= self.gpus_per_node else min(self.inside, self.network)


@dataclass(frozen=True)
class Prediction:
    """One row of the plan; milliseconds are of a step."""

    gpus: int
    nodes: int
    global_batch: int
    step_ms: float
    images_per_second: float
    efficiency: float
    """Images per second, as a share of `gpus` times those of one GPU that waits for nothing."""
    hours: float
    sent_bytes: int
    """Bytes that each GPU sends for the all-reduce of a step."""
    exposed_ms: float
    """Time of the all-reduce that is left after the backward pass."""
    gather_ms: float
    """Time of gathered rows: their way, and the arithmetic with them."""
    gather_bytes: int
    """Bytes of them that each GPU receives in a step."""
    loader_ms: float
    disk_ms: float
    disk_bytes_per_second: float
    """Bytes that each node reads per second."""
    memory: int
    """Bytes that each GPU needs."""
    fits: bool
    bottleneck: str


def buckets(arrivals: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(share of the backward pass after which it is full, bytes) of each of DDP's buckets, once it has seen the order in which
    gradients arrive: a bucket is closed by the gradient that brings it to its limit."""
    found: list[tuple[float, int]] = []
    size = 0
    for number, (share, more) in enumerate(arrivals):
        size += more
        if size >= (BUCKET if found else FIRST_BUCKET) or number == len(arrivals) - 1:
            found.append((share, size))
            size = 0
    return found


def sent_bytes(size: int, gpus: int) -> int:
    """Bytes that each GPU sends in a ring all-reduce of `size` bytes: 2 (n - 1) / n x size."""
    return 2 * (gpus - 1) * size // gpus


def exposed_ms(report: Report, cluster: Cluster, gpus: int) -> float:
    """Milliseconds of the all-reduce after the backward pass: buckets go one after the other, each when it is full."""
    if gpus == 1:
        return 0.0
    backward = sum(part.ms for part in report.parts if part.name == BACKWARD or part.name.endswith(" backward"))
    backward /= report.setting.accumulate  # the gradients travel during the last micro-batch's
    messages = 2 * math.ceil(math.log2(gpus))
    free = 0.0
    for share, size in buckets(report.traffic.arrivals):
        transfer = 1000 * (sent_bytes(size, gpus) / cluster.bandwidth(gpus) + messages * cluster.latency)
        free = max(free, share * backward) + transfer
    return max(0.0, free - backward)


def gathered(report: Report, cluster: Cluster, gpus: int) -> tuple[float, int, int]:
    """Milliseconds, received bytes and held bytes of rows from all GPUs in a step, beyond those of the GPU's own.

    The model is that of a contrast: each row is float32 with an int64 beside it (its category), the losses gather one after the
    other in the forward pass, where nothing hides it, and each of a GPU's rows is multiplied with each of the others'.
    """
    gathers = [each for loss in report.traffic.gathers.values() for each in loss]
    accumulate = report.setting.accumulate
    sizes = [(gpus - 1) * each.rows * (4 * each.width + 8) for each in gathers]
    # the product of own rows with the others' columns, and the product that makes the gradient: 2 x 2 operations a number
    flops = sum(4 * each.rows * (gpus - 1) * each.rows * each.width for each in gathers)
    way = sum(sizes) / cluster.bandwidth(gpus) + 2 * len(gathers) * math.ceil(math.log2(gpus)) * cluster.latency
    seconds = way + flops / 1e12 / report.ceiling.teraflops_float32
    return 1000 * accumulate * seconds, accumulate * sum(sizes), max(sizes, default=0)


def local_ms(report: Report) -> float:
    """Milliseconds of a step that waits neither for data nor for other processes (of several: steps without all-reduce)."""
    whole = report.step.ms - report.part_ms(ALL_REDUCE) if report.step.local_ms is None else report.step.local_ms
    return whole - report.part_ms(DATA)


def held_bytes(report: Report) -> int:
    """Bytes that one process holds: on a GPU the allocator's peak, on a CPU the sum by owner, without PyTorch's own code."""
    return report.memory.peak if report.setting.on_gpu else sum(report.memory.owners.values())


def images_that_fit(report: Report, memory: float) -> int:
    """The micro-batch that would fill so many bytes, where what is saved for the backward grows with it."""
    saved = sum(size for name, size in report.memory.owners.items() if name.startswith("saved by"))
    fixed = sum(report.memory.owners.values()) - saved
    each = (held_bytes(report) - fixed) / report.setting.micro_batch
    return max(0, int((memory - fixed) / each))


def predict(
    report: Report, cluster: Cluster, gpus: int, epochs: float, images: int, gather: bool, live: bool = False
) -> Prediction:
    """The step of so many GPUs, each with the ledger's batch; `live`: with the live teacher in the place of its cache."""
    setting, traffic = report.setting, report.traffic
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    per_gpu = setting.micro_batch * setting.accumulate
    local = local_ms(report) + (report.cache.live_ms - report.step.ms if live and report.cache is not None else 0.0)
    exposed = exposed_ms(report, cluster, gpus)
    gather_ms, gather_bytes, gather_held = gathered(report, cluster, gpus) if gather else (0.0, 0, 0)
    loader = 1000 * per_gpu / (report.ceiling.loader_images_per_second * cluster.loader)
    disk = 1000 * min(gpus, cluster.gpus_per_node) * per_gpu * traffic.bytes_per_image / cluster.disk
    working = local + exposed + gather_ms
    step = max(working, loader, disk)
    rate = 1000 * gpus * per_gpu / step
    memory = held_bytes(report) + gather_held
    costs = {"all-reduce": exposed, "gathered rows": gather_ms}
    return Prediction(
        gpus=gpus,
        nodes=nodes,
        global_batch=gpus * per_gpu,
        step_ms=step,
        images_per_second=rate,
        efficiency=local / step,
        hours=epochs * images / rate / 3600,
        sent_bytes=sent_bytes(traffic.gradient_bytes, gpus),
        exposed_ms=exposed,
        gather_ms=gather_ms,
        gather_bytes=gather_bytes,
        loader_ms=loader,
        disk_ms=disk,
        disk_bytes_per_second=rate / nodes * traffic.bytes_per_image,
        memory=memory,
        fits=memory <= cluster.memory,
        bottleneck=first_bottleneck(step, working, {"decoding": loader, "disk": disk}, costs, memory <= cluster.memory),
    )


def first_bottleneck(step: float, working: float, beside: dict[str, float], costs: dict[str, float], fits: bool) -> str:
    """The first bottleneck: memory, then what is slower than the models, then what makes the step notably longer."""
    if not fits:
        return "memory"
    if step > working:
        return max(beside, key=lambda name: beside[name])
    worst = max(costs, key=lambda name: costs[name])
    return worst if costs[worst] >= COUNTS * step else "the models"
