"""A plan of a cluster from one measured step: images/s, hours, memory, network and disk for 1 to 1,024 GPUs, and the first
bottleneck.

    python pipelines/scale.py --ledger ledger.json --gpus-per-node 8 --network-gbits 400 --disk-gbytes 5 --memory-gib 80

The ledger is `pipelines/benchmark.py --json`'s, of the pair, losses, precision and batch per GPU that are planned, on one
such GPU. The model is in docs/performance.md: the batch per GPU stays, gradients are all-reduced bucket by bucket while the
backward pass goes on, the loader and the disk work beside the step, nothing is slower for being one of many.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.command_line import Parser, command, new_file
from distill.config import RecipeError
from distill.files import write_atomically
from distill.text_table import table
from pipelines.measure.report import Report
from pipelines.measure.timeline import ALL_REDUCE, BACKWARD, DATA

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes after which DDP closes its first gradient bucket and every later one."""
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
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


def predict(report: Report, cluster: Cluster, gpus: int, epochs: float, images: int, gather: bool) -> Prediction:
    """The step of so many GPUs, each with the ledger's batch."""
    setting, traffic = report.setting, report.traffic
    nodes = math.ceil(gpus / cluster.gpus_per_node)
    per_gpu = setting.micro_batch * setting.accumulate
    local = local_ms(report)
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


def as_text(rows: Sequence[Prediction], gather: bool) -> str:
    """The rows for people; the columns of gathered rows only where they are gathered."""
    head = ["GPUs", "nodes", "batch", "ms", "images/s", "eff.", "hours", "sent MB", "exposed"]
    head += ["gather ms", "recv. MB"] if gather else []
    lines = [[*head, "disk MB/s", "GiB", "first"]]
    for row in rows:
        more = [f"{row.gather_ms:.2f}", f"{row.gather_bytes / 1e6:.1f}"] if gather else []
        lines.append(
            [
                *(str(row.gpus), str(row.nodes), str(row.global_batch)),
                *(f"{row.step_ms:.2f}", f"{row.images_per_second:.1f}", f"{row.efficiency:.2f}", f"{row.hours:.2f}"),
                *(f"{row.sent_bytes / 1e6:.1f}", f"{row.exposed_ms:.2f}", *more),
                *(f"{row.disk_bytes_per_second / 1e6:.0f}", f"{row.memory / 2**30:.2f}", row.bottleneck),
            ]
        )
    return table(lines, "r" * (len(lines[0]) - 1) + "l")


def heading(report: Report, cluster: Cluster, epochs: float, images: int) -> str:
    """The first lines of the plan: what is planned, and from which measurement."""
    setting = report.setting
    most = images_that_fit(report, cluster.memory)
    return (
        f"{setting.teacher} -> {setting.student}, {' + '.join(setting.losses)}; {epochs:g} epochs of {images:,} images\n"
        f"measured on {setting.device}, processes: {setting.processes}; {report.step.ms:.1f} ms for"
        f" {setting.micro_batch} x {setting.accumulate} images, data wait {report.part_ms(DATA):.1f} ms of it\n"
        f"memory of a GPU would hold about {most} images a micro-batch; the global batch grows with the GPUs, and the learning"
        " rate has to follow it\n"
        f"losses that can gather rows from every GPU: {' and '.join(report.traffic.gathers) or 'none'}; all others send nothing"
        " but their share of the gradient"
    )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises RecipeError for numbers that no cluster has."""
    parser = Parser(description=__doc__ or "")
    parser.add_argument("--ledger", type=Path, required=True, metavar="FILE", help="a report of pipelines/benchmark.py --json")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a node (%(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=list(SIZES), metavar="N", help="sizes to plan (8 to 1,024)")
    parser.add_argument("--network-gbits", type=float, default=400.0, help="Gbit/s of a node, one direction (%(default)s)")
    parser.add_argument("--inside-gbytes", type=float, default=300.0, help="GB/s of a GPU to its node's others (%(default)s)")
    parser.add_argument("--latency-us", type=float, default=10.0, help="microseconds that a message takes (%(default)s)")
    parser.add_argument("--disk-gbytes", type=float, default=5.0, help="GB/s that a node reads (%(default)s)")
    parser.add_argument("--memory-gib", type=float, default=80.0, help="GiB of a GPU (%(default)s)")
    parser.add_argument("--loader-factor", type=float, default=1.0, help="decoding threads over the ledger's (%(default)s)")
    parser.add_argument("--epochs", type=float, help="epochs to plan; default: the recipe's")
    parser.add_argument("--images", type=int, help="images of an epoch; default: the ledger's training split")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the rows there")
    found = parser.parse_args(argv)
    for name, value in vars(found).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, (int, float)) and number <= 0:
                raise RecipeError(f"--{name.replace('_', '-')}: {number} must be more than 0")
    return found


def cluster_of(asked: argparse.Namespace) -> Cluster:
    """The cluster of the command line."""
    return Cluster(
        gpus_per_node=asked.gpus_per_node,
        network=asked.network_gbits * 1e9 / 8,
        inside=asked.inside_gbytes * 1e9,
        latency=asked.latency_us / 1e6,
        disk=asked.disk_gbytes * 1e9,
        memory=asked.memory_gib * 2**30,
        loader=asked.loader_factor,
    )


def plan(asked: argparse.Namespace) -> dict[str, list[Prediction]]:
    """Prints the plan; its rows without and with gathered negatives."""
    report, cluster = Report.read(asked.ledger), cluster_of(asked)
    epochs = asked.epochs or report.setting.recipe["train"]["epochs"]
    images = asked.images or report.traffic.training_images
    print(heading(report, cluster, epochs, images))
    found = {"own": [predict(report, cluster, gpus, epochs, images, gather=False) for gpus in asked.gpus]}
    print("\n" + as_text(found["own"], gather=False))
    if report.traffic.gathers:
        found["gathered"] = [predict(report, cluster, gpus, epochs, images, gather=True) for gpus in asked.gpus]
        names = " and ".join(report.traffic.gathers)
        print(f"\nwhere {names} gathers from every GPU\n{as_text(found['gathered'], gather=True)}")
        still = [row.gpus for row in found["gathered"] if row.fits and row.gather_ms < COUNTS * row.step_ms]
        upto = f"up to {max(still)} GPUs" if still else "at none of these sizes"
        print(f"gather fits and takes less than {COUNTS:.0%} of the step {upto}")
    return found


@command
def main(argv: Sequence[str]) -> None:
    """Prints the plan, and writes it where that is asked."""
    asked = arguments(argv)
    found = plan(asked)
    if asked.json:
        facts = {name: [asdict(row) for row in rows] for name, rows in found.items()}
        write_atomically(asked.json, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
