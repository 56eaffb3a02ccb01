"""Two real processes through a split with bad images: the same steps, one report each, exactly the planted faults together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from distill.data.order import TrainOrder
from tests.distill.data.conftest import picture
from tests.distill.data.planting import BAD, encoded, raw_split
from tests.distill.data.test_loaders import needs_dali

ROOT = Path(__file__).resolve().parents[3]
RANK = """
import json, sys, torch
from pathlib import Path
from distill.data.augment.parameters import TrainTransform
from distill.data.dali import DaliLoader
from distill.data.index import ShardIndex
from distill.data.loaders import train_task
folder, rank, report = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
task = train_task(
    ShardIndex.open(folder), size=(64, 64), transform=TrainTransform(), global_batch_size=32, accumulate=2, rank=rank,
    world_size=2, seed=5, device=torch.device("cpu"), num_threads=1, max_bad_rate=0.05, fault_report=report,
)
loader = DaliLoader(task)
sizes = [len(batch.images) for epoch in range(2) for batch in loader.epoch(epoch)]
print(json.dumps({"sizes": sizes, "found": loader.quarantine.found_here, "bad": loader.quarantine.samples()}))
loader.close()
"""


@needs_dali
def test_two_processes_lose_no_step_and_report_exactly_the_planted_faults(tmp_path):
    images = [encoded(picture(60 + n % 9, 70 - n % 5, seed=n), quality=80) for n in range(1000)]
    bad = {}
    for place, spoil in enumerate(BAD.values()):
        bad[f"k{place * 80 + 7:03d}"] = images[place * 80 + 7] = spoil(images[0])
    index = raw_split(tmp_path / "split", images, shards=5)
    reports = [tmp_path / f"faults{rank}.jsonl" for rank in range(2)]
    lines = [[sys.executable, "-c", RANK, str(index.folder), str(rank), str(reports[rank])] for rank in range(2)]
    processes = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in lines]
    told = []
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        told.append(json.loads(out.splitlines()[-1]))
    steps = TrainOrder(1000, 32, 5).steps_per_epoch
    assert [each["sizes"] for each in told] == [[8] * (2 * 2 * steps)] * 2
    seen = visited_samples(1000)
    visited = {index.key(sample) for sample in range(1000) if sample in seen} & set(bad)
    found = [json.loads(line) for report in reports if report.exists() for line in report.read_text().splitlines()]
    assert {line["key"] for line in found} == visited
    assert sum(each["found"] for each in told) == len(found)
    for rank, report in enumerate(reports):
        mine = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        assert {line["rank"] for line in mine} <= {rank}
        assert sorted(line["sample"] for line in mine) == told[rank]["bad"]


def visited_samples(count: int) -> set[int]:
    order = TrainOrder(count, 32, 5)
    steps = [order.samples(epoch, step) for epoch in range(2) for step in range(order.steps_per_epoch)]
    return set(np.concatenate(steps).tolist())
