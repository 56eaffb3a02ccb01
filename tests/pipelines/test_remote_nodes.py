"""Three hosts on one machine: two network namespaces train over lanes, and a third serves the shards."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.data.index import ShardIndex
from shards.prepare import main as prepare
from tests.pipelines.test_nodes import ROOT, Hosts, ended, hosts, ip
from tests.runs import arguments, assert_same_run, steps_of

__all__ = ["hosts"]  # a fixture
LANES = ("--data.shuffle", "lanes", "--data.lanes", "4", "--data.lane_window", "1", "--train.global_batch_size", "8")
SERVER = "10.79.0.1"


class Store:
    """A namespace with a cable to each of both hosts, and a server of a folder in it."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts, self.tag = hosts, uuid.uuid4().hex[:6]
        self.name = f"ks{self.tag}"
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "addr", "add", f"{SERVER}/32", "dev", "lo")
        for number, host in enumerate(hosts.names):
            near, far, net = f"vs{number}{self.tag}", f"vh{number}{self.tag}", f"10.78.{number}"
            ip("link", "add", near, "netns", self.name, "type", "veth", "peer", "name", far, "netns", host)
            for name, link, last in ((self.name, near, 1), (host, far, 2)):
                ip("-n", name, "addr", "add", f"{net}.{last}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
            ip("-n", host, "route", "add", f"{SERVER}/32", "via", f"{net}.1")
        line = [sys.executable, "-m", "tests.distill.data.range_server", str(folder), SERVER, "8000"]
        self.server = subprocess.Popen(["ip", "netns", "exec", self.name, *line], cwd=ROOT)

    def cable(self, number: int, state: str) -> None:
        ip("-n", self.name, "link", "set", f"vs{number}{self.tag}", state)

    def remove(self) -> None:
        self.server.kill()
        self.server.wait()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)


@pytest.fixture
def many_shards(digits: Path, tmp_path: Path) -> Path:
    assert prepare(["folder", "--source", str(digits / "images"), "--out", str(tmp_path / "made"), "--shards", "12"]) == 0
    return tmp_path / "made"


@pytest.fixture
def store(hosts: Hosts, many_shards: Path) -> Iterator[Store]:
    made = Store(hosts, many_shards)
    yield made
    made.remove()


def test_two_nodes_over_lanes_of_a_bucket_one_cut_off_go_on_to_the_weights_of_local_files(
    hosts: Hosts, store: Store, many_shards: Path, tmp_path: Path
):
    """Each node fetches its own lanes only; the node that was cut off from all comes back with an empty cache."""
    local, out = tmp_path / "local", tmp_path / "remote"
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    more = [*LANES, "--train.checkpoint_every", "4", "--train.timeout_minutes", "0.3"]
    straight = [hosts.start(rank, [*arguments(many_shards, local), *more], logs[rank]) for rank in (0, 1)]
    assert ended(straight, 300) == [0, 0], logs[0].read_text()[-3000:]

    def both(caches: tuple[str, str]) -> list[subprocess.Popen]:
        places = ["--train", f"http://{SERVER}:8000/train", "--val", f"http://{SERVER}:8000/val", "--resume"]
        asked = [*arguments(many_shards, out), *more, *places]
        return [hosts.start(rank, [*asked, "--data.cache_dir", str(tmp_path / caches[rank])], logs[rank]) for rank in (0, 1)]

    jobs = both(("a", "b"))
    end = time.monotonic() + 200
    while not ((out / "metrics.jsonl").is_file() and len(steps_of(out)) >= 6):
        assert time.monotonic() < end, logs[0].read_text()[-3000:]
        assert [job.poll() for job in jobs] == [None, None], logs[0].read_text()[-3000:]
        time.sleep(0.02)
    hosts.cut()
    store.cable(1, "down")
    assert all(code not in (0, None) for code in ended(jobs, 120)), "both ended by themselves"
    assert not (out / "summary.json").exists()
    hosts.mend()
    store.cable(1, "up")
    ip("-n", hosts.names[1], "route", "replace", f"{SERVER}/32", "via", "10.78.1.1")
    assert ended(both(("a", "new")), 300) == [0, 0], logs[1].read_text()[-3000:]
    assert "going on from step" in logs[0].read_text()
    assert_same_run(local, out)

    digest = ShardIndex.load(many_shards / "train").digest
    held = [{path.name for path in (tmp_path / cache / digest).glob("*.tar")} for cache in ("a", "new")]
    assert held[0] | held[1] == {f"{shard:05d}.tar" for shard in range(12)}
    assert len(held[0] & held[1]) <= 1, "but for the shard that the border between both splits, each is at one node"
