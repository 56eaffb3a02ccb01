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
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.command_line import Parser, command, new_file
from distill.config import RecipeError
from distill.files import write_atomically
from distill.text_table import table
from pipelines.measure.cluster import COUNTS, Cluster, Prediction, images_that_fit, predict
from pipelines.measure.report import Report
from pipelines.measure.timeline import DATA

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)


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
    if report.cache is not None:
        hours = (predict(report, cluster, gpus, epochs, images, gather=False, live=True).hours for gpus in asked.gpus)
        print("\nhours with the teacher live: " + ", ".join(f"{h:.3g} on {n}" for n, h in zip(asked.gpus, hours, strict=True)))
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
