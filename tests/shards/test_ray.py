"""Shards made on Ray are the same as those made here, also where a worker is killed; skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.shards.preparing import ROOT, command, file_hashes, image_bytes

pytest.importorskip("ray", reason="Ray is not installed")
SHARDS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "images"
    (folder / "a").mkdir(parents=True)
    for number in range(240):
        (folder / "a" / f"{number:03d}.jpg").write_bytes(image_bytes(number, (300, 300)))
    return folder


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("local") / "out"
    command("folder", "--source", images, "--out", out, "--shards", SHARDS, "--one-class")
    return file_hashes(out)


def test_shards_made_on_ray_are_byte_identical(images, expected, tmp_path):
    command("folder", "--source", images, "--out", tmp_path / "out", "--shards", SHARDS, "--engine", "ray", "--one-class")
    assert file_hashes(tmp_path / "out") == expected


def test_a_killed_ray_worker_loses_nothing(images, expected, tmp_path):
    """A worker is killed (-9) while it makes a shard; Ray makes that shard again on another."""
    line = [
        sys.executable,
        str(ROOT / "shards/prepare.py"),
        "folder",
        "--one-class",
        "--source",
        str(images),
        "--out",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*line, "--shards", str(SHARDS), "--engine", "ray"], stderr=subprocess.PIPE, env=environment)
    worker_in_a_shard(process, tmp_path / "out").send_signal(signal.SIGKILL)
    assert process.wait(timeout=120) == 0, process.stderr.read()
    assert file_hashes(tmp_path / "out") == expected


def worker_in_a_shard(driver: subprocess.Popen[bytes], out: Path) -> psutil.Process:
    """A worker of the driver's cluster, stopped while the shard that it writes is half made."""
    end = time.monotonic() + 120
    while time.monotonic() < end and driver.poll() is None:
        for path in out.glob(".train-*.aside"):
            worker = psutil.Process(int(path.name.split(".")[-2]))
            worker.suspend()
            if path.exists():
                assert worker.name().startswith("ray::")
                return worker
            worker.resume()
        time.sleep(0.001)
    raise AssertionError(f"no worker was seen at work: {driver.stderr.read() if driver.stderr else ''}")
