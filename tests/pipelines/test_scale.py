"""The plan of a cluster: its bytes are DDP's own, its arithmetic is what it says."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm

import distill.models  # noqa: F401 (registers the CIFAR architectures)
from distill.protocols import Gathered
from pipelines.measure.cluster import Cluster, buckets, predict, sent_bytes
from pipelines.measure.report import CacheUse, Ceiling, MemoryUse, Report, Setting, Step, StepPart, Traffic, WarmUp
from pipelines.measure.timeline import ALL_REDUCE, BACKWARD, FORWARD, REST, TEACHER
from pipelines.scale import main
from tests.measured import arguments, measured


def test_bytes_of_two_processes_are_as_predicted(digits: Path, tmp_path: Path):
    """Buckets and gathered negatives to the byte, against DDP's and gloo's own."""
    noted = tmp_path / "gathers.jsonl"
    more = ["--student", "cifar_resnet8x4", "--loss.msdcrd.gather", "true", "--train.global_batch_size", "8"]
    report = measured(arguments(digits, *more), tmp_path / "two.json", world_size=2, gathered=noted)
    assert (report.setting.processes, report.setting.micro_batch) == (2, 4)
    assert ALL_REDUCE in [part.name for part in report.parts]

    student = timm.create_model("cifar_resnet8x4", num_classes=10)
    trained = sum(p.nbytes for p in student.parameters())
    assert trained < report.traffic.gradient_bytes == sum(report.traffic.buckets)
    assert len(report.traffic.buckets) > 1
    assert [size for _, size in buckets(report.traffic.arrivals)] == report.traffic.buckets

    bandwidth = report.ceiling.network_bytes_per_second
    assert bandwidth is not None
    cluster = Cluster(2, bandwidth, bandwidth, 0.0, disk=1e12, memory=1e12, loader=1e6)
    # one bucket of everything sends each byte once there and once back: for two, the gradient's size
    predicted = predict(report, cluster, 2, epochs=1, images=100, gather=True)
    assert predicted.sent_bytes == report.traffic.gradient_bytes
    lines = [json.loads(line) for line in noted.read_text().splitlines()]
    gathers = report.traffic.gathers["msdcrd"]
    rows = {each.rows for each in gathers if each.gathered}
    steps = [received for received, length in lines if length in rows]  # the first step asks for the ranks' counts too
    each = 2 * len(gathers)
    assert len(rows) == 1
    assert len(steps) % each == 0
    assert sum(steps[-each:]) == predicted.gather_bytes


MIB = 2**20


def a_report(**changes: Any) -> Report:
    """A step of 100 ms, 40 of them backward, whose gradients fill a bucket of 1 MiB half-way and one of 25 MiB at the end."""
    parts = {TEACHER: 20.0, FORWARD: 30.0, BACKWARD: 40.0, REST: 10.0}
    traffic = Traffic(26 * MIB, [], [(0.5, MIB), (0.9, 5 * MIB), (1.0, 20 * MIB)], {}, 100_000.0, 1_000_000)
    report = Report(
        format=3,
        setting=Setting(
            device="a GPU",
            on_gpu=True,
            cores=8,
            threads=8,
            torch="2",
            processes=1,
            precision="bf16",
            compiled="none",
            channels_last=True,
            teacher_precision="auto",
            teacher="resnet34",
            student="resnet18",
            losses=["sdd"],
            advice={"sdd": ""},
            image_size=[224, 224],
            micro_batch=64,
            accumulate=1,
            data="shards",
            clock="wall",
            recipe={"train": {"epochs": 100}},
        ),
        warm_up=WarmUp(3, 1.0, 500.0, None, ""),
        step=Step(100.0, 640.0, 20, [100.0] * 20, 100.0, None),
        parts=[StepPart(name, ms, ms / 100, None) for name, ms in parts.items()],
        ceiling=Ceiling(90.0, 1.1, [1.1], 6400.0, 1000.0, 20.0, 100.0, 50.0, {TEACHER: 7.0}, None, None),
        memory=MemoryUse(10 * 2**30, BACKWARD, {"saved by student forward": 8 * 2**30, "gradients": 2**30}),
        traffic=traffic,
        bottleneck="",
    )
    return replace(report, **changes)


def a_cluster(**changes: float) -> Cluster:
    """Two GPUs a node; 1 GiB/s and no latency between any two, enough of everything else."""
    wide = Cluster(2, float(2**30), float(2**30), 0.0, disk=1e12, memory=float(80 * 2**30), loader=1.0)
    return replace(wide, **changes)


def test_of_a_ledger_with_a_teacher_cache_the_hours_without_it_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cached = a_report(cache=CacheUse(1000, 60.0, 150.0))
    alone = [predict(cached, a_cluster(loader=1e6), 1, 90, 10**6, gather=False, live=live) for live in (False, True)]
    assert alone[1].step_ms - alone[0].step_ms == pytest.approx(50.0)
    cached.write(tmp_path / "ledger.json")
    assert main(["--ledger", str(tmp_path / "ledger.json"), "--gpus", "8", "16"]) == 0
    assert re.search(r"hours with the teacher live: [\d.]+ on 8, [\d.]+ on 16", capsys.readouterr().out)


def test_a_ring_sends_its_part_to_all_others_twice():
    assert [sent_bytes(1200, gpus) for gpus in (1, 2, 3, 4)] == [0, 1200, 1600, 1800]


def test_a_bucket_is_closed_by_the_gradient_that_fills_it():
    arrivals = [(0.1, MIB // 2), (0.2, MIB), (0.3, 24 * MIB), (0.4, MIB - 1), (0.5, 2), (0.6, 5)]
    assert buckets(arrivals) == [(0.2, 3 * MIB // 2), (0.5, 25 * MIB + 1), (0.6, 5)]


def test_what_is_left_of_the_all_reduce_is_what_follows_the_backward_pass():
    """Of 2 GPUs at 1 GiB/s: 1 MiB takes 1000 / 1024 ms from 20 ms on, 25 MiB take 25 times that from the end on."""
    row = predict(a_report(), a_cluster(), 2, epochs=1, images=1000, gather=False)
    assert row.exposed_ms == pytest.approx(25 * 1000 / 1024)
    assert row.step_ms == pytest.approx(100 + row.exposed_ms)
    assert row.bottleneck == "all-reduce"
    slow = predict(a_report(), a_cluster(inside=float(10 * MIB)), 2, 1, 1000, gather=False)
    assert slow.exposed_ms == pytest.approx(20 + 100 + 2500 - 40), "the second bucket waits for the first"
    late = predict(a_report(), a_cluster(latency=0.001), 2, 1, 1000, gather=False)
    assert late.exposed_ms == pytest.approx(row.exposed_ms + 2), "there and back"


def test_a_ring_over_nodes_is_as_fast_as_the_network():
    rows = [predict(a_report(), a_cluster(network=2.0**27), gpus, 1, 1000, gather=False) for gpus in (2, 4)]
    assert rows[1].exposed_ms / rows[0].exposed_ms == pytest.approx(8 * sent_bytes(4, 4) / sent_bytes(4, 2), rel=0.01)
    assert [row.nodes for row in rows] == [1, 2]


def test_hours_images_and_disk_follow_from_the_step():
    row = predict(a_report(), a_cluster(inside=1e15, network=1e15), 4, epochs=90, images=1_281_167, gather=False)
    assert (row.global_batch, row.images_per_second) == (256, pytest.approx(2560, rel=1e-3))
    assert row.hours == pytest.approx(90 * 1_281_167 / 2560 / 3600, rel=1e-3)
    assert row.disk_bytes_per_second == pytest.approx(1280 * 100_000, rel=1e-3)
    assert row.efficiency == pytest.approx(1, rel=1e-3)
    assert row.bottleneck == "the models"


def test_what_gives_out_first_is_named():
    fast: dict[str, float] = {"inside": 1e15, "network": 1e15}
    gathers = replace(a_report().traffic, gathers={"msdcrd": [Gathered(1344, 512, False)]})
    found = [
        predict(a_report(), a_cluster(**fast, memory=float(2**30)), 8, 1, 1000, gather=False),
        predict(a_report(), a_cluster(**fast, loader=0.05), 8, 1, 1000, gather=False),
        predict(a_report(), a_cluster(**fast, disk=1e8), 8, 1, 1000, gather=False),
        predict(a_report(traffic=gathers), a_cluster(**fast), 1024, 1, 1000, gather=True),
    ]
    assert [row.bottleneck for row in found] == ["memory", "decoding", "disk", "gathered rows"]
    assert [row.fits for row in found] == [False, True, True, True]
    assert found[1].step_ms == pytest.approx(200)  # 64 images at 320 a second
    assert found[2].step_ms == pytest.approx(128)  # two GPUs' 64 images of 100 kB at 100 MB/s
    # 1,023 x 1,344 columns for 1,344 rows of 512 numbers, twice, at 50 TFLOP/s
    assert found[3].gather_ms == pytest.approx(1000 * 4 * 1344 * 1023 * 1344 * 512 / 50e12, rel=1e-3)
    assert found[3].gather_bytes == 1023 * 1344 * (4 * 512 + 8)
    assert found[3].memory == 10 * 2**30 + found[3].gather_bytes


def test_the_command_plans_8_to_1024_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ledger, rows = tmp_path / "ledger.json", tmp_path / "rows.json"
    a_report(traffic=replace(a_report().traffic, gathers={"msdcrd": [Gathered(1344, 512, False)]})).write(ledger)
    assert main(["--ledger", str(ledger), "--json", str(rows)]) == 0
    shown, found = capsys.readouterr().out, json.loads(rows.read_text())
    assert [row["gpus"] for row in found["own"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert found["own"][0]["hours"] > found["own"][-1]["hours"] > 0
    assert all(f"{row['images_per_second']:.1f}" in shown for row in found["own"] + found["gathered"])
    assert "resnet34 -> resnet18" in shown
    assert "gather fits and takes less than 5% of the step up to" in shown


def test_a_result_takes_the_place_of_an_old_one_whole(tmp_path: Path):
    """The old file is not written into, so whoever reads meanwhile, or after a kill, has the old one or the new one."""
    ledger, rows, old = tmp_path / "ledger.json", tmp_path / "rows.json", tmp_path / "old"
    old.write_text("old")
    for path in (ledger, rows):
        path.hardlink_to(old)
    a_report().write(ledger)
    assert main(["--ledger", str(ledger), "--json", str(rows)]) == 0
    assert old.read_text() == "old"
    assert json.loads(rows.read_text())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--ledger", "nothing.json"], "nothing.json: No such file"),
        (["--ledger", "x.json", "--network-gbits", "-1"], "--network-gbits: -1.0 must be more than 0"),
        (["--ledger", "x.json", "--gpus", "8", "0"], "--gpus: 0 must be"),
        (["--gpus", "8"], "--ledger"),
        (["--ledger", "x.json", "--epoch", "1"], "--epoch: unknown option, did you mean --epochs?"),
    ],
)
def test_a_wrong_request_gets_one_line_and_exit_code_2(wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(wrong) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
