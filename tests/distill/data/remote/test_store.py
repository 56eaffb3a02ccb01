"""The node's cache of remote shards: real processes, a real server, real files; every byte that is read is compared."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.data.index import ShardIndex, ShardInfo, write_split
from distill.data.order import Lanes, TrainOrder
from distill.data.reader import BadSample, SampleReader
from distill.data.reference import read_sample
from distill.data.remote import cached_store, fetch
from distill.data.remote.cache import Room, cache_folder, check_cache, file_system, share_room
from distill.data.remote.cached_store import CachedStore
from distill.data.remote.schedule import SLACK, eval_schedule, train_schedule
from distill.data.store import ShardLost
from distill.data.stream import Position
from tests.distill.data.planting import flip_on_disk
from tests.distill.data.remote.range_server import RangeServer

ROOT = Path(__file__).resolve().parents[4]
COUNT, SHARDS = 40, 8


@pytest.fixture
def local(make_split: Callable[..., ShardIndex]) -> ShardIndex:
    return make_split(count=COUNT, shards=SHARDS)


@pytest.fixture
def server(local: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setattr(fetch, "PART", 30_000)
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    with RangeServer(local.folder.parent) as running:
        yield running


@pytest.fixture
def opened(local: ShardIndex, server: RangeServer, tmp_path: Path) -> Iterator[Callable[[], ShardIndex]]:
    """Opens the split as one whose shards were indexed where they lie: its manifest has their URL and ETags."""
    found: list[ShardIndex] = []

    def make(cache: str = "cache") -> ShardIndex:
        shards = [replace(shard, etag=server.etag(local.folder / shard.name)) for shard in local.shards]
        (tmp_path / "split").mkdir(exist_ok=True)
        write_split(tmp_path / "split", shards, local.records, local.class_names, root=f"{server.url}/shards")
        found.append(ShardIndex.open(tmp_path / "split", tmp_path / cache))
        return found[-1]

    yield make
    for index in found:
        index.store.close()


def cached(index: ShardIndex) -> CachedStore:
    assert isinstance(index.store, CachedStore)
    return index.store


def shards_of(server: RangeServer) -> list[str]:
    """The shards of which a first part was asked for, in order."""
    return [path[-8:-4] for method, path, asked, _ in server.log if method == "GET" and asked.startswith("bytes=0-")]


def same_bytes(index: ShardIndex, local: ShardIndex, samples: range = range(COUNT)) -> bool:
    ours, theirs = SampleReader(index), SampleReader(local)
    try:
        return all(np.array_equal(ours.read(sample), theirs.read(sample)) for sample in samples)
    finally:
        ours.close()
        theirs.close()


def test_a_prepared_split_is_read_from_its_url_and_each_shard_comes_once(
    local: ShardIndex, server: RangeServer, tmp_path: Path
):
    for _ in range(2):
        index = ShardIndex.open(f"{server.url}/shards/", tmp_path)
        assert index.digest == local.digest
        assert same_bytes(index, local)
        assert [index.key(sample) for sample in range(COUNT)] == [local.key(sample) for sample in range(COUNT)]
        assert read_sample(index, 3) == read_sample(local, 3)
    assert (
        sorted(shards_of(server)) == sorted(["x.np", *(shard.name[-8:-4] for shard in local.shards)])
        or len(shards_of(server)) == SHARDS + 2 + 1
    )  # two manifests, one index


def test_a_split_is_read_through_a_command(local: ShardIndex, tmp_path: Path):
    index = ShardIndex.open(f"pipe:cat {local.folder}/{{}}", tmp_path)
    assert same_bytes(index, local)


def test_the_command_of_a_manifest_is_not_run(local: ShardIndex, tmp_path: Path):
    write_split(tmp_path, local.shards, local.records, local.class_names, root=f"pipe:touch {tmp_path}/ran; cat {{}}")
    with pytest.raises(ValueError, match="would run the command"):
        ShardIndex.open(tmp_path, tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"), [({"name": "../x.tar"}, "outside of its root"), ({"name": 5}, "damaged"), ({"etag": 5}, "damaged")]
)
@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_manifest_whose_shard_lies_elsewhere_or_has_no_name_is_refused(
    local: ShardIndex, tmp_path: Path, change: dict[str, Any], said: str, kind: str
):
    file = Path(shutil.copytree(local.folder, tmp_path / "shards")) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0] |= change
    file.write_text(json.dumps(manifest))
    with RangeServer(tmp_path) as server, pytest.raises(ValueError, match=said):
        ShardIndex.open({"folder": str(file.parent), "url": f"{server.url}/shards"}[kind], tmp_path / "cache")


def test_a_manifest_of_local_shards_is_what_it_was(local: ShardIndex):
    assert local.manifest["format"] == 2
    assert set(local.manifest["shards"][0]) == {"name", "samples", "bytes", "sha256"}


CHILD = """
import sys
from pathlib import Path
from distill.data.remote import cached_store, fetch
from distill.data.index import ShardIndex
from distill.data.reader import SampleReader
fetch.PART, fetch.BACKOFF = 3000, 0.01
index = ShardIndex.load(sys.argv[1], Path(sys.argv[2]))
check = index.store._arrived
def arrived(shard, descriptor):
    check(shard, descriptor)
    with open(sys.argv[3], "a") as file:
        file.write(f"{shard}\\n")
index.store._arrived = arrived
reader = SampleReader(index)
for sample in range(index.num_samples):
    reader.read(sample)
"""


def test_of_eight_processes_whose_downloader_is_killed_each_object_is_fetched_whole_once(
    opened: Callable[[], ShardIndex], server: RangeServer, tmp_path: Path
):
    """A killed downloader's lock is freed by the kernel; whoever waits for it fetches anew, and checks every byte it reads."""
    folder = cached(opened()).folder
    server.delay = 0.02
    line = [sys.executable, "-c", CHILD, str(tmp_path / "split"), str(tmp_path / "cache"), str(tmp_path / "arrived")]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    running = [start() for _ in range(8)]
    kills, end = 0, time.monotonic() + 120
    while kills < 4:
        assert time.monotonic() < end
        victim = next((child for child in running if child.poll() is None and downloads(child.pid, folder)), None)
        if victim is None:
            assert any(child.poll() is None for child in running), "all were done before four were killed"
            time.sleep(0.005)
            continue
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        running[running.index(victim)] = start()
        kills += 1
    for child in running:
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
    assert sorted((tmp_path / "arrived").read_text().split()) == [str(shard) for shard in range(SHARDS)]
    assert not list(folder.glob("*.part"))


def downloads(process: int, folder: Path) -> bool:
    """Whether the process has a download open."""
    links = Path(f"/proc/{process}/fd")
    try:
        return any(os.readlink(link).endswith(cached_store.PART_FILE) for link in links.iterdir())
    except OSError:
        return False


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # a download that ended meanwhile
        return 0


def walk(index: ShardIndex, epochs: int) -> int:
    """Reads as a loader does; the most bytes that the cache held."""
    reader, most = SampleReader(index), 0
    for epoch in range(epochs):
        for sample in range(COUNT):
            reader.reached(Position(epoch, sample))
            reader.read(sample)
            most = max(most, sum(map(size_of, cached(index).folder.glob("*.tar*"))))
    reader.close()
    return most


@pytest.mark.parametrize("spare", [0, 10**9])
def test_with_the_least_room_each_shard_is_fetched_once_an_epoch_and_with_more_once(
    opened: Callable[[], ShardIndex], local: ShardIndex, server: RangeServer, spare: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("distill.data.remote.schedule.SLACK", 1)
    monkeypatch.setattr(cached_store, "SCAN_SECONDS", 0.01)
    index = opened()
    sizes = [shard.bytes for shard in index.shards]
    schedule = eval_schedule(index.shard_samples, sizes, batch_size=1, node=range(1), world_size=1)
    limit = schedule.least_bytes() + spare
    assert schedule.least_bytes() < sum(sizes) == schedule.epoch_bytes()
    cached(index).follow(schedule, limit)
    assert walk(index, epochs=2) <= limit
    index.store.close()
    fetched = shards_of(server)
    assert len(set(fetched)) == SHARDS
    assert len(fetched) <= (SHARDS if spare else 2 * SHARDS + 2)  # two are fetched ahead for a third epoch


def test_a_node_fetches_only_the_shards_of_its_lanes(local: ShardIndex):
    sizes, lanes = [shard.bytes for shard in local.shards], Lanes(4, 1, local.shard_samples)
    order = TrainOrder(COUNT, 4, seed=0, lanes=lanes)
    schedules = [train_schedule(order, local.shard_samples, sizes, node=node, nodes=2, accumulate=1) for node in range(2)]
    needed = [set(schedule.upcoming(Position(0, 0))) for schedule in schedules]
    assert needed[0] | needed[1] == set(range(SHARDS))
    assert not needed[0] & needed[1]
    assert sum(schedule.epoch_bytes() for schedule in schedules) == sum(sizes)


@pytest.mark.parametrize("options", [{}, {"shuffle_block": 5}, {"repeats": 2}])
def test_the_schedule_names_exactly_the_shards_that_the_order_reads(local: ShardIndex, options: dict[str, int]):
    order, sizes = TrainOrder(COUNT, 8, seed=0, **options), [shard.bytes for shard in local.shards]
    schedule = train_schedule(order, local.shard_samples, sizes, node=1, nodes=2, accumulate=2)
    for epoch in range(2):
        shard, first, last = schedule.of_epoch(epoch)
        for number in range(SHARDS):
            steps = [
                step
                for step in range(order.steps_per_epoch)
                if number in local.records["shard"][order.samples(epoch, step)[[2, 3, 6, 7]]]
            ]
            found = [(a - epoch * 5, b - epoch * 5) for s, a, b in zip(shard, first, last, strict=True) if s == number]
            assert found == ([(steps[0], steps[-1])] if steps else [])


def test_a_shuffle_of_the_whole_split_needs_all_of_it_at_once(local: ShardIndex):
    sizes = [shard.bytes for shard in local.shards]
    schedule = train_schedule(TrainOrder(COUNT, 8, seed=0), local.shard_samples, sizes, node=0, nodes=1, accumulate=2)
    assert schedule.least_bytes() == schedule.epoch_bytes() == sum(sizes)


def test_the_need_of_a_shard_follows_the_order_over_the_end_of_the_epoch():
    schedule = eval_schedule([20, 20, 20], [100, 100, 100], batch_size=1, node=range(1), world_size=1)
    assert schedule.next_use(Position(0, 19 + SLACK)).tolist() == [0, 0, 21 - SLACK]
    assert schedule.next_use(Position(0, 20 + SLACK)).tolist() == [40 - SLACK, 0, 20 - SLACK]
    assert schedule.next_use(Position(0, 59)).tolist() == [1, 21, 0]
    assert schedule.upcoming(Position(0, 59)) == [2, 0, 1]
    assert schedule.idle(Position(0, 59)) == [0, 1]
    assert schedule.next_use(Position(1, 0)).tolist() == [0, 20, 40]
    assert schedule.least_bytes() == 200 + 100


def test_room_below_the_least_is_refused_with_the_least_and_the_remedy():
    wanted = {"train": Room(700_000_000, 9_000_000_000), "val": Room(300_500_000, 400_000_000)}
    with pytest.raises(ValueError, match=r"0\.999 GB.* 1\.001 GB .*0\.7 GB for train, 0\.3 GB for val.*take lanes"):
        share_room(999_000_000, wanted, "take lanes")
    assert share_room(1_101_000_000, wanted, "") == {"train": 701_000_000, "val": 400_000_000}
    assert share_room(1_000_500_000, wanted, "") == {"train": 700_000_000, "val": 300_500_000}
    assert share_room(10**12, wanted, "") == {"train": 9_000_000_000, "val": 400_000_000}


def test_an_evicted_shard_is_read_on_by_who_has_it_open_and_nothing_else_is_ever_deleted(
    opened: Callable[[], ShardIndex], local: ShardIndex, tmp_path: Path
):
    """mosaicml/streaming#988: an eviction deleted the only copy of local shards."""
    index = opened()
    folder = cached(index).folder
    folder.mkdir(parents=True, exist_ok=True)
    kept = [tmp_path / "cache" / "other" / "00000.tar", folder / "mine.txt", *map(local.shard_path, range(SHARDS))]
    for path in kept[:2]:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    cached(index).limit = 1
    reader, theirs = SampleReader(index), SampleReader(local)
    firsts = [int(np.flatnonzero(index.records["shard"] == shard)[0]) for shard in range(SHARDS)]
    for shard, sample in enumerate(firsts):
        assert np.array_equal(reader.read(sample), theirs.read(sample))
        assert [path.name for path in folder.glob("*.tar")] == [f"{shard:05d}.tar"]
    for sample in range(COUNT):
        assert np.array_equal(reader.read(sample), theirs.read(sample))
    reader.close()
    theirs.close()
    assert all(path.exists() for path in kept)
    assert same_bytes(local, local)


def test_a_damaged_copy_is_fetched_once_more_and_the_image_is_right(
    opened: Callable[[], ShardIndex], local: ShardIndex, server: RangeServer, caplog: pytest.LogCaptureFixture
):
    index, other = opened(), opened()
    assert same_bytes(index, local)
    reader, theirs = SampleReader(other), SampleReader(local)
    sample = COUNT - 1
    reader.read(sample)
    flip_on_disk(index, sample, 3)
    assert np.array_equal(SampleReader(index).read(sample), theirs.read(sample))
    assert read_sample(other, sample) == theirs.read(sample).tobytes()
    assert np.array_equal(reader.read(sample), theirs.read(sample)), "who had the damaged file open takes the new one"
    assert len(shards_of(server)) == SHARDS + 1
    assert "is damaged; fetched again" in caplog.text


def test_a_shard_that_the_store_itself_has_damaged_is_fetched_once_more_and_then_its_image_is_bad(
    make_split: Callable[..., ShardIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of a store without ETags: nothing but the checksums tells."""
    made = make_split(count=20, shards=2)
    folder = tmp_path / "served"
    folder.mkdir()
    for path in made.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    flip_on_disk(ShardIndex.load(folder), 4, 3)
    with RangeServer(tmp_path) as server:
        index = ShardIndex.open(f"{server.url}/served", tmp_path / "cache")
        for _ in range(3):
            reader = SampleReader(index)
            with pytest.raises(BadSample, match="checksum"):
                reader.read(4)
            assert reader.read(5) is not None
        assert server.gets("0000.tar") == 2


def test_a_copy_of_another_size_is_not_used(opened: Callable[[], ShardIndex], local: ShardIndex, server: RangeServer):
    index = opened()
    path = cached(index).path(2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"left by a crash of the machine")
    assert same_bytes(index, local)


def test_what_a_killed_download_left_is_overwritten_and_its_room_is_given_back(
    opened: Callable[[], ShardIndex], local: ShardIndex
):
    index = opened()
    folder = cached(index).folder
    folder.mkdir(parents=True, exist_ok=True)
    for shard in (0, 5):
        (folder / f"{shard:05d}{cached_store.PART_FILE}").write_bytes(bytes(10**6))
    cached(index).limit = 10**6
    os.close(index.store.open(0))
    assert sorted(path.name for path in folder.glob("*.tar*")) == ["00000.tar"]
    assert same_bytes(index, local)


FULL = """
import os, sys
from pathlib import Path
from distill.data.index import ShardIndex
from distill.data.reader import SampleReader
from distill.data.store import ShardLost
index = ShardIndex.load(sys.argv[1], Path(sys.argv[2]))
reader = SampleReader(index)
for sample in range(index.num_samples):
    reader.read(sample)
    for shard in set(reader._files) - {int(index.records[sample]["shard"])}:
        del reader._files[shard]
print("read")
reader.close()
for path in index.store.folder.glob("*.tar"):
    path.unlink()
disk = os.statvfs(sys.argv[2])
Path(sys.argv[2], "foreign").write_bytes(bytes((disk.f_bavail - 1) * disk.f_frsize))
try:
    reader.read(0)
except ShardLost as error:
    print(error)
"""


def test_a_full_disk_evicts_and_then_says_what_is_missing(opened: Callable[[], ShardIndex], tmp_path: Path):
    """On a real disk of two shards and a half, which only root of a namespace of its own can have."""
    index = opened()
    size = 5 * max(shard.bytes for shard in index.shards) // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs {disk} && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    line = [*mount, sys.executable, "-c", FULL, str(tmp_path / "split"), str(disk)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, lost = done.stdout.splitlines()
    assert read == "read"
    assert f"no room in {disk}" in lost
    assert f"{index.shards[0].bytes} bytes are needed" in lost


def test_a_shard_replaced_while_a_run_reads_is_refused_and_no_byte_of_it_is_kept(
    opened: Callable[[], ShardIndex], server: RangeServer
):
    index = opened()
    server.tags[index.shards[3].name] = '"new"'
    with pytest.raises(ShardLost, match=rf'{index.shards[3].name}: was replaced.*ETag "\w+".*"new".*index'):
        index.store.open(3)
    assert not [path for path in cached(index).folder.iterdir() if ".tar" in path.name]


def test_at_the_start_a_replaced_shard_and_refused_credentials_are_said(
    opened: Callable[[], ShardIndex], server: RangeServer, local: ShardIndex
):
    index = opened()
    server.tags[index.shards[0].name] = '"new"'
    with pytest.raises(ValueError, match='"new"'):
        cached(index).check()
    server.always = "403"
    with pytest.raises(ValueError, match="access denied"):
        cached(index).check()


def test_a_store_that_can_list_is_asked_for_every_shard_at_the_start(
    local: ShardIndex, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "REGION": "x", "ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    assert same_bytes(ShardIndex.open("s3://shards", tmp_path / "cache"), local)
    shards = [*local.shards[:-1], replace(local.shards[-1], bytes=5)]
    write_split(tmp_path / ".", shards, local.records, local.class_names, root="s3://shards")
    with pytest.raises(ValueError, match=rf"{shards[-1].name}: was replaced.* 5 bytes"):
        ShardIndex.open(tmp_path, tmp_path / "cache")
    shards[-1] = replace(local.shards[-1], name="train-9999.tar")
    write_split(tmp_path / ".", shards, local.records, local.class_names, root="s3://shards")
    with pytest.raises(ValueError, match=r"train-9999\.tar: shard is missing"):
        ShardIndex.open(tmp_path, tmp_path / "cache")
    write_split(tmp_path / ".", local.shards, local.records, local.class_names, root="s3://shards")
    (tmp_path / "alone/shards").mkdir(parents=True)
    shutil.copy(local.folder / local.shards[0].name, tmp_path / "alone/shards")
    server.folder = tmp_path / "alone"
    with pytest.raises(ValueError, match=rf"{local.shards[1].name}: shard is missing"):  # one alone is left
        ShardIndex.open(tmp_path, tmp_path / "cache")


def test_a_shard_of_other_images_and_the_same_size_is_found_when_it_arrives(
    opened: Callable[[], ShardIndex], server: RangeServer, local: ShardIndex, monkeypatch: pytest.MonkeyPatch
):
    index = opened()
    store_ = cached(index)
    other = {"name": local.shards[1].name, "bytes": local.shards[1].bytes}
    store_._shards = (ShardInfo(samples=local.shards[0].samples, sha256="", **other), *local.shards[1:])
    with pytest.raises(ShardLost, match=r"first, middle and last image"):
        store_.open(0)


def test_a_shard_that_is_waited_for_is_named_with_what_has_come_of_it(
    opened: Callable[[], ShardIndex], server: RangeServer, local: ShardIndex
):
    index, other = opened(), opened()
    server.script.extend(["slow"] * 100)
    threads = [threading.Thread(target=lambda each=each: os.close(each.store.open(1))) for each in (index, other)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    end = time.monotonic() + 20
    while not (index.store.waiting() and other.store.waiting()) and time.monotonic() < end:
        time.sleep(0.01)
    where, size = f"shard {server.url}/shards/{local.shards[1].name}", f"{local.shards[1].bytes / 1e6:.1f} MB"
    assert index.store.waiting() == f"{where}, 0.0 of {size}"
    assert other.store.waiting().startswith(f"{where} of {size}, which another process fetches: a part came at ")
    server.slow.set()
    for thread in threads:
        thread.join()
    assert not index.store.waiting()


def test_two_runs_share_a_cache_whose_room_is_too_small_for_both(
    opened: Callable[[], ShardIndex], local: ShardIndex, server: RangeServer
):
    indices = [opened(), opened()]
    results: list[bool] = []
    for index in indices:
        cached(index).limit = 2 * max(shard.bytes for shard in index.shards)
    threads = [threading.Thread(target=lambda index=index: results.append(same_bytes(index, local))) for index in indices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True, True]


MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /data rw - nfs4 host:/export rw
31 22 0:41 / /data/with\040space rw - tmpfs tmpfs rw
32 22 0:42 / /mnt/bucket rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/home/me", "ext4"), ("/data/cache", "nfs4"), ("/data/with space/x", "tmpfs"), ("/mnt/bucket", "fuse.s3fs")],
)
def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount(folder: str, kind: str):
    assert file_system(Path(folder), MOUNTS.strip()) == kind


def test_a_cache_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_cache(tmp_path / "made")
    table = tmp_path / "mountinfo"
    table.write_text(f"30 22 0:40 / {tmp_path.resolve()} rw - lustre host:/export rw\n")
    monkeypatch.setattr("distill.data.remote.cache.MOUNTS", table)
    with pytest.raises(ValueError, match=r"network file system \(lustre\).*disk of this machine"):
        check_cache(tmp_path / "made")


def test_a_cache_in_the_place_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        check_cache(tmp_path / "file" / "cache")


@pytest.mark.parametrize("place", ["manifest of a folder", "url"])
def test_a_cache_whose_folder_of_the_split_is_no_folder_is_refused(
    opened: Callable[[], ShardIndex], server: RangeServer, local: ShardIndex, tmp_path: Path, place: str
):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / local.digest).touch()
    with pytest.raises(ValueError, match=f"data.cache_dir: .*{local.digest} cannot be made"):
        opened() if place != "url" else ShardIndex.open(f"{server.url}/shards", tmp_path / "cache")


def test_the_cache_lies_in_the_users_folder_of_caches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/distill")
    assert cache_folder("/asked") == Path("/asked")


def test_a_lock_that_is_held_does_not_keep_a_run_from_ending(opened: Callable[[], ShardIndex]):
    index = opened()
    folder = cached(index).folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "00000.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(0.2, index.store.close).start()
        with pytest.raises(ShardLost, match="stopped"):
            index.store.open(0)
