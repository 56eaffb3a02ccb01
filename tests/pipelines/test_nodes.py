"""Two hosts and a web server on one machine: three network namespaces on one switch, training over the network on shards that
the server has."""

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

from distill.data.index import ShardIndex
from shards.prepare import main as prepare
from tests.pipelines.test_robustness import FROZEN
from tests.processes import finished
from tests.runs import arguments, assert_same_run, steps_of

ROOT = Path(__file__).parents[2]
SERVER, PORT = "10.77.0.3", 8000


class Hosts:
    """Two namespaces, 10.77.0.1 and 10.77.0.2, each with a cable to the switch in a third one, 10.77.0.3, where the server is.
    What is started in them ends with them."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.names = [f"ka{tag}", f"kb{tag}"]
        self.switch = f"ks{tag}"
        self.links = [f"va{tag}", f"vb{tag}"]
        self.started: list[subprocess.Popen] = []

    def make(self) -> None:
        for name in (*self.names, self.switch):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "addr", "add", f"{SERVER}/24", "dev", "br0")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            ip("link", "add", link, "netns", name, "type", "veth", "peer", "name", link, "netns", self.switch)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", self.switch, "link", "set", link, "master", "br0", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", self.links[1], "up")

    def remove(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
        for name in (*self.names, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def serve(self, folder: Path) -> None:
        """Starts the web server of a folder."""
        serving = [sys.executable, "-m", "tests.distill.data.remote.range_server", str(folder), SERVER, str(PORT)]
        command = ["ip", "netns", "exec", self.switch, *serving]
        self.started.append(subprocess.Popen(command, cwd=ROOT, start_new_session=True))

    def start(self, rank: int, argv: list[str], log: Path, cache: Path) -> subprocess.Popen:
        """One process on host `rank`, as `torchrun --nnodes 2 --node-rank RANK` starts it, with a cache of its own."""
        launch = ["--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        launch += ["--master-addr", "10.77.0.1", "--master-port", "29500", "pipelines/imagenet.py"]
        command = ["ip", "netns", "exec", self.names[rank], sys.executable, "-m", "torch.distributed.run", *launch, *argv]
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": self.links[rank],
            "XDG_CACHE_HOME": str(cache),
        }
        with log.open("a") as file:
            job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.started.append(job)
        return job


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
    """Over lanes of shards that a server has: every host fetches its own, and the weights are those of local files."""
    split = tmp_path / "split"
    assert prepare(["folder", "--source", str(digits / "images"), "--out", str(split), "--shards", "12"]) == 0
    lanes = ["--data.shuffle", "lanes", "--data.lanes", "4", "--data.lane_window", "1"]
    more = [*FROZEN, *lanes, "--train.checkpoint_every", "2", "--train.timeout_minutes", "0.3"]
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    logs, caches = [tmp_path / "a.log", tmp_path / "b.log"], [tmp_path / "a", tmp_path / "b"]
    finished(arguments(split, straight, *more), tmp_path / "straight.log", world_size=2)
    remote = ["--train", f"http://{SERVER}:{PORT}/train", "--val", f"http://{SERVER}:{PORT}/val", "--resume"]

    def both() -> list[subprocess.Popen]:
        argv = arguments(split, cut, *more, *remote)
        return [hosts.start(rank, argv, logs[rank], caches[rank]) for rank in (0, 1)]

    hosts.serve(split)
    jobs = both()
    end = time.monotonic() + 200
    while not ((cut / "metrics.jsonl").is_file() and len(steps_of(cut)) >= 3):
        assert time.monotonic() < end, logs[0].read_text()[-3000:]
        assert [job.poll() for job in jobs] == [None, None], logs[0].read_text()[-3000:]
        time.sleep(0.02)
    hosts.cut()
    assert all(code not in (0, None) for code in ended(jobs, 120)), "both ended by themselves"
    assert re.search(r"gone: rank 1|no progress for \d+ s", logs[0].read_text())
    assert re.search(r"gone|rendezvous host has not answered|no progress for \d+ s", logs[1].read_text())
    assert not (cut / "summary.json").exists()

    hosts.mend()
    shutil.rmtree(caches[1])  # as on another machine: nothing depends on what a cache holds
    assert ended(both(), 300) == [0, 0], logs[0].read_text()[-3000:]
    assert "going on from step" in logs[0].read_text()
    assert json.loads((cut / "manifest.json").read_text())["world_size"] == 2
    assert_same_run(straight, cut)
    digest = ShardIndex.open(split / "train").digest
    held = [{path.name for path in cache.glob(f"*/{digest}/*.tar")} for cache in caches]
    assert all(held)
    assert len(held[0] & held[1]) <= 1, "a border of the lanes may split a shard"
    assert len(held[0] | held[1]) == 12
