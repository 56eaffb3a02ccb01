"""Two hosts on one machine: two network namespaces joined by a cable, one process each, training over the network."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.pipelines.test_robustness import FROZEN
from tests.runs import arguments, assert_same_run, steps_of

ROOT = Path(__file__).parents[2]


class Hosts:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, and the veth pair between them."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names = [f"ka{tag}", f"kb{tag}"]
        self.links = [f"va{tag}", f"vb{tag}"]

    def make(self) -> None:
        a, b = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.links[0], "netns", a, "type", "veth", "peer", "name", self.links[1], "netns", b)
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def start(self, rank: int, argv: list[str], log: Path) -> subprocess.Popen:
        """One process on host `rank`, as `torchrun --nnodes 2 --node-rank RANK` starts it."""
        launch = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        launch += ["--master-addr", "10.77.0.1", "--master-port", "29500", "pipelines/imagenet.py"]
        command = ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "torch.distributed.run", *launch, *argv]
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.links[rank],
        }
        with log.open("a") as file:
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed: no network namespaces")
    made = Hosts()
    try:
        made.make()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    yield made
    made.remove()


def ended(jobs: list[subprocess.Popen], seconds: float) -> list[int | None]:
    end = time.monotonic() + seconds
    for job in jobs:
        try:
            job.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, 9)
    return [job.poll() for job in jobs]


def test_a_host_that_is_cut_off_ends_the_run_on_both_and_it_goes_on_afterwards(hosts: Hosts, digits: Path, tmp_path: Path):
    more = [*FROZEN, "--train.checkpoint_every", "2", "--train.timeout_minutes", "0.3"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    logs = [tmp_path / "a.log", tmp_path / "b.log"]

    def both(out: Path, *extra: str) -> list[subprocess.Popen]:
        return [hosts.start(rank, arguments(digits, out, *more, *extra), logs[rank]) for rank in (0, 1)]

    assert ended(both(straight), 300) == [0, 0], logs[0].read_text()[-3000:]
    assert json.loads((straight / "manifest.json").read_text())["world_size"] == 2

    jobs = both(cut, "--resume")
    end = time.monotonic() + 200
    while not ((cut / "metrics.jsonl").is_file() and len(steps_of(cut)) >= 3):
        assert time.monotonic() < end, logs[0].read_text()[-3000:]
        assert [job.poll() for job in jobs] == [None, None]
        time.sleep(0.02)
    hosts.cut()
    assert all(code not in (0, None) for code in ended(jobs, 120)), "both ended by themselves"
    assert re.search(r"gone: rank 1|no progress for \d+ s", logs[0].read_text())
    assert re.search(r"gone|rendezvous host has not answered|no progress for \d+ s", logs[1].read_text())
    assert not (cut / "summary.json").exists()

    hosts.mend()
    assert ended(both(cut, "--resume"), 300) == [0, 0], logs[0].read_text()[-3000:]
    assert "going on from step" in logs[0].read_text()
    assert_same_run(straight, cut)
