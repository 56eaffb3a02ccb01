"""The step that `pipelines/scale.py` predicts from a ledger over the step that was measured, on one and on two processes here.

    python -m tests.bench.prediction

Both come of one run, in turn, so that a busy machine is busy for both. Two shared cores need a tolerance of 1.5.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from distill.command_line import Parser, command
from distill.text_table import table
from pipelines.measure.cluster import Cluster, predict
from pipelines.measure.report import Report
from shards.prepare import prepare_digits

ROOT = Path(__file__).resolve().parents[2]
ASKED = (
    *("--teacher", "cifar_resnet14", "--teacher-weights", "random", "--student", "cifar_resnet8x4", "--data", "memory"),
    *("--loss.msdcrd.gather", "true", "--train.global_batch_size", "8", "--steps", "12", "--rounds", "3", "--warm-up", "2"),
)


def this_machine(report: Report) -> Cluster:
    """The machine that the ledger measured; two messages of a tree are the latency of one all-reduce."""
    bandwidth, latency = report.ceiling.network_bytes_per_second, report.ceiling.network_latency_ms
    if bandwidth is None or latency is None:  # one process
        return Cluster(1, 1.0, 1.0, 0.0, disk=1e12, memory=1e12, loader=1e6)
    return Cluster(2, bandwidth, bandwidth, latency / 2000, disk=1e12, memory=1e12, loader=1e6)


def measured(processes: int, folder: Path) -> Report:
    """The ledger of so many processes on this CPU, of one thread each."""
    file = folder / f"{processes}.json"
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    data = ("--train", str(folder / "train"), "--val", str(folder / "val"), "--json", str(file))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(ROOT / "pipelines" / "benchmark.py"), *ASKED, *data], env=environment, check=True)
    return Report.read(file)


@command
def main(argv: Sequence[str]) -> None:
    """Prints predicted and measured steps."""
    Parser(description=__doc__ or "").parse_args(argv)
    rows = [["processes", "predicted ms", "measured ms", "ratio"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_digits(folder)
        for processes in (1, 2):
            report = measured(processes, folder)
            predicted = predict(report, this_machine(report), processes, 1, 100, gather=False).step_ms
            seen = report.step.unmarked_ms
            rows.append([str(processes), f"{predicted:.1f}", f"{seen:.1f}", f"{predicted / seen:.2f}"])
    print(table(rows, "rrrr"))


if __name__ == "__main__":
    sys.exit(main())
