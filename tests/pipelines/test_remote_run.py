"""Runs over shards of a remote store by the real command: the same weights as from local files, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from distill.data.index import ShardIndex, write_split
from distill.losses import LOSSES
from pipelines.evaluate import main as evaluate
from pipelines.setup.arguments import parse
from pipelines.setup.data import build_splits
from tests.distill.data.remote.range_server import RangeServer
from tests.processes import finished, start
from tests.runs import arguments, assert_same_run, last_state, steps_of

LANES = ("--data.shuffle", "lanes", "--data.lanes", "4", "--data.lane_window", "1", "--train.global_batch_size", "8")
"""18 steps an epoch."""


@pytest.fixture
def server(many_shards: Path) -> Iterator[RangeServer]:
    with RangeServer(many_shards) as running:
        yield running


def remote(server: RangeServer, out: Path, cache: Path, *more: str) -> list[str]:
    places = ["--train", f"{server.url}/train", "--val", f"{server.url}/val", "--data.cache_dir", str(cache)]
    return [*arguments(Path(), out)[4:], *places, *LANES, "--train.checkpoint_every", "4", *more]


def fetched(server: RangeServer) -> list[str]:
    return [path for method, path, asked, _ in server.log if method == "GET" and path.endswith(".tar")]


def test_a_remote_run_that_is_killed_goes_on_from_an_empty_cache_and_from_a_local_copy_to_the_weights_of_local_files(
    server: RangeServer, many_shards: Path, tmp_path: Path
):
    local = [*arguments(many_shards, tmp_path / "local"), *LANES, "--train.checkpoint_every", "4"]
    finished(local, tmp_path / "log", world_size=2)
    out = tmp_path / "remote"
    server.script.extend(["503", "", "", "cut", "", "", "short", "", ""] * 3)
    job = start(remote(server, out, tmp_path / "first"), tmp_path / "log", world_size=2)
    job.wait_until(lambda: (out / "metrics.jsonl").is_file() and len(steps_of(out)) >= 6)
    job.kill()
    job = start(remote(server, out, tmp_path / "second", "--resume"), tmp_path / "log", world_size=2)
    job.wait_until(lambda: len(steps_of(out)) >= 16)
    job.kill()
    shutil.rmtree(tmp_path / "first")
    copied = [*arguments(many_shards, out), *LANES, "--train.checkpoint_every", "4", "--resume"]
    finished(copied, tmp_path / "log", world_size=2)
    assert job.text().count("going on from step") == 2
    assert_same_run(tmp_path / "local", out)


def test_two_ranks_of_a_node_fetch_each_shard_once_and_the_run_says_what_it_reads(
    server: RangeServer, many_shards: Path, tmp_path: Path
):
    job = finished(remote(server, tmp_path / "run", tmp_path / "cache"), tmp_path / "log", world_size=2)
    assert sorted(fetched(server)) == sorted(set(fetched(server)))
    assert len(fetched(server)) == 12 + len(ShardIndex.load(many_shards / "val").shards)
    assert "remote shards: each node reads train " in job.text()
    assert "once a run" in job.text()
    assert job.text().count("8 connections for each of 2 processes") == 1


def test_a_local_run_goes_on_from_a_bucket(server: RangeServer, many_shards: Path, tmp_path: Path):
    out, local = tmp_path / "run", arguments(many_shards, tmp_path / "run")
    finished([*local, *LANES, "--train.checkpoint_every", "4", "--train.max_steps", "8"], tmp_path / "log")
    finished(remote(server, out, tmp_path / "cache", "--resume"), tmp_path / "log")
    finished([*arguments(many_shards, tmp_path / "straight"), *LANES, "--train.checkpoint_every", "4"], tmp_path / "log")
    ours, theirs = last_state(out), last_state(tmp_path / "straight")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_cache_below_the_least_is_refused_with_the_least_and_with_it_the_run_is_made(
    server: RangeServer, many_shards: Path, tmp_path: Path
):
    job = finished(
        remote(server, tmp_path / "run", tmp_path / "cache", "--data.cache_limit", "1e-6"), tmp_path / "log", codes=2
    )
    refusal = next(line for line in job.text().splitlines() if "a larger --data.cache_limit" in line)
    assert "for train" in refusal
    assert "fewer --data.lanes" in refusal
    least = refusal.split("needs ")[1].split(" GB")[0]
    asked = remote(server, tmp_path / "run", tmp_path / "cache", "--data.cache_limit", least)
    finished(asked, tmp_path / "log", world_size=2)


@pytest.mark.parametrize(("always", "said"), [("403", "access denied"), ("401", "access denied"), ("404", "not there")])
def test_refused_access_and_a_wrong_url_end_the_request_with_one_line(
    server: RangeServer, tmp_path: Path, always: str, said: str
):
    server.always = always
    job = finished(remote(server, tmp_path / "run", tmp_path / "cache"), tmp_path / "log", codes=2)
    (line,) = [line for line in job.text().splitlines() if line.startswith("error")]
    assert said in line
    assert server.url in line
    assert not (tmp_path / "run/manifest.json").exists()


@pytest.mark.parametrize(("fault", "said"), [("403", "access denied"), ("replaced", "was replaced since it was indexed")])
def test_credentials_that_expire_and_objects_that_are_replaced_end_the_run_with_their_name(
    server: RangeServer, many_shards: Path, tmp_path: Path, fault: str, said: str
):
    """The shards are not yet there when it happens: the validation split's are fetched by the first evaluation."""
    index = ShardIndex.load(many_shards / "val")
    shards = [replace(shard, etag=server.etag(many_shards / "val" / shard.name)) for shard in index.shards]
    (tmp_path / "val").mkdir()
    write_split(tmp_path / "val", shards, index.records, index.class_names, root=f"{server.url}/val")
    out = tmp_path / "run"
    asked = [*remote(server, out, tmp_path / "cache"), "--val", str(tmp_path / "val")]
    job = start(asked, tmp_path / "log")
    job.wait_until(lambda: (out / "metrics.jsonl").is_file() and len(steps_of(out)) >= 1)
    if fault == "403":
        server.always = fault
    server.tags.update({shard.name: '"new"' for shard in shards})
    assert job.wait() == [1]
    assert said in job.text()
    assert "--resume goes on" in job.text()
    server.always = ""
    server.tags.clear()
    finished([*asked, "--resume"], tmp_path / "log")


def test_a_run_whose_shards_do_not_come_ends_by_its_watchdog_which_names_the_shard(server: RangeServer, tmp_path: Path):
    server.script.extend(["", "", "", ""] + ["slow"] * 1000)
    asked = remote(server, tmp_path / "run", tmp_path / "cache", "--train.timeout_minutes", "0.05")
    job = start(asked, tmp_path / "log")
    assert job.wait() == [1]
    assert f"waiting for data (shard {server.url}/train/train-" in job.text()
    assert "no progress for" in job.text()


def test_evaluation_reads_a_split_of_a_url(server: RangeServer, many_shards: Path, tmp_path: Path, fresh_accelerate: None):
    figures, threads = [], threading.active_count()
    for number, place in enumerate([str(many_shards / "val"), f"{server.url}/val"]):
        out = tmp_path / f"{number}.json"
        line = ["--model", "cifar_resnet8", "--weights", "random", "--val", place, "--json", str(out)]
        torch.manual_seed(0)  # of the random weights
        assert evaluate([*line, "--cache-dir", str(tmp_path / "cache")]) == 0
        figures.append(json.loads(out.read_text()))
        del figures[-1]["images_per_second"]
    assert figures[0] == figures[1]
    assert threading.active_count() - threads < 8, "those that fetch over 8 connections have ended"


def test_the_embedded_digits_are_not_made_beside_shards_of_a_url(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None
):
    monkeypatch.chdir(tmp_path)
    recipe = parse(remote(server, Path("run"), Path("cache"), "--data.prepare", "digits"), LOSSES).recipe
    build_splits(recipe, Accelerator(cpu=True)).close()
    assert os.listdir() == ["cache"]
