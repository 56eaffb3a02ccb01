"""Shards that others keep in a bucket, behind https or on the hub: indexed by reading each once, nothing of them kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.data.index import ShardIndex
from distill.data.reader import SampleReader
from distill.data.remote import fetch
from shards.prepare import main
from tests.distill.data.remote.range_server import COMMIT, RangeServer
from tests.shards.preparing import ROOT
from tests.shards.test_existing import packed, samples

NAMES = [f"train-{number:04d}.tar" for number in range(5)] + ["val-0000.tar"]


def numbered(number: int) -> tuple[str, bytes]:
    return "cls", str(number % 3).encode()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    for name in NAMES:
        (tmp_path / "bucket/in").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket/in" / name).write_bytes(packed(samples(numbered, count=3 + len(name) + int(name[-5]))))
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    with RangeServer(tmp_path) as running:
        secrets = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "a-secret", "REGION": "eu-west-7", "ENDPOINT_URL": running.url}
        for name, value in secrets.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield running


def shards_read(server: RangeServer) -> list[str]:
    return sorted(path.split("/")[-1] for method, path, _, _ in server.log if method == "GET" and path.endswith(".tar"))


def index_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("index.npy"))}


def test_the_index_of_a_bucket_is_that_of_its_folder_and_each_shard_is_read_once_and_not_kept(
    server: RangeServer, tmp_path: Path
):
    pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    server.script.extend(["", "503", "cut"])
    assert main(["wds", "--source", "s3://bucket/in", "--out", str(tmp_path / "out")]) == 0
    assert main(["wds", "--source", str(tmp_path / "bucket/in"), "--out", str(tmp_path / "local")]) == 0
    assert index_bytes(tmp_path / "out") == index_bytes(tmp_path / "local")
    assert sorted(set(shards_read(server))) == NAMES
    assert len(shards_read(server)) == len(NAMES) + 2
    assert not list((tmp_path / "out").rglob("*.tar*"))
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert (manifest["format"], manifest["root"]) == (3, "s3://bucket/in")
    assert manifest["store"] == {"region": "eu-west-7", "endpoint": server.url}
    assert manifest["shards"][0]["etag"] == server.etag(tmp_path / "bucket/in" / NAMES[0])
    assert "secret" not in (tmp_path / "out/train/manifest.json").read_text()


def test_what_was_indexed_is_read_where_the_environment_no_longer_says_the_endpoint_and_verified(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    assert main(["wds", "--source", "s3://bucket/in", "--out", str(tmp_path / "out")]) == 0
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    index, local = ShardIndex.open(tmp_path / "out/val"), tmp_path / "bucket/in/val-0000.tar"
    assert SampleReader(index).read(0).tobytes() in local.read_bytes()
    assert main(["verify", str(tmp_path / "out"), "--full"]) == 0
    assert "no defects" in capsys.readouterr().out
    server.tags["train-0000.tar"] = '"new"'
    shutil.rmtree(tmp_path / "caches")
    assert main(["verify", str(tmp_path / "out"), "--full"]) == 1
    assert "train-0000.tar: was replaced since it was indexed" in capsys.readouterr().out


def test_a_web_server_is_indexed_by_its_info_file_or_by_names_and_not_by_wildcards(
    server: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    url = f"{server.url}/bucket/in"
    assert main(["wds", "--source", url, "--out", str(tmp_path / "out")]) == 2
    assert "this store cannot list: name all, as --split" in capsys.readouterr().err
    assert main(["wds", "--source", url, "--out", str(tmp_path / "out"), "--split", "train=train-*.tar"]) == 2
    line = ["--split", "train=train-{0000..0004}.tar", "--split", "val=val-0000.tar"]
    assert main(["wds", "--source", url, "--out", str(tmp_path / "named"), *line]) == 0
    splits = {name: {"filenames": [n for n in NAMES if n.startswith(name)]} for name in ("train", "val")}
    (tmp_path / "bucket/in/_info.json").write_text(json.dumps({"splits": splits}))
    assert main(["wds", "--source", url, "--out", str(tmp_path / "told")]) == 0
    assert index_bytes(tmp_path / "named") == index_bytes(tmp_path / "told")
    assert len(index_bytes(tmp_path / "named")) == 2
    missing = ["--split", "train=train-{0003..0009}.tar"]
    assert main(["wds", "--source", url, "--out", str(tmp_path / "other"), *missing]) == 2
    assert "train-0005.tar: not there" in capsys.readouterr().err


def test_the_hub_is_pinned_to_the_commit_that_was_listed(
    server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface-hub is not installed")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert main(["wds", "--source", "hf://datasets/org/name/bucket/in", "--out", str(tmp_path / "out")]) == 0
    assert shards_read(server) == NAMES
    index = ShardIndex.load(tmp_path / "out/train")
    assert index.manifest["root"] == f"hf://datasets/org/name@{COMMIT}/bucket/in"
    assert {shard.version for shard in index.shards} == {COMMIT}
    server.always = "403"
    assert main(["wds", "--source", "hf://datasets/org/name", "--out", str(tmp_path / "denied")]) == 2
    assert "access denied" in capsys.readouterr().err


def test_indexing_that_is_killed_goes_on_with_the_shards_that_are_missing(server: RangeServer, tmp_path: Path):
    names = ["--split", "train=train-{0000..0004}.tar", "--split", "val=val-0000.tar"]
    line = ["wds", "--source", f"{server.url}/bucket/in", "--out", str(tmp_path / "out"), *names]
    server.delay = 0.2
    job = subprocess.Popen([sys.executable, "shards/prepare.py", *line], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list((tmp_path / "out").rglob("[0-9]*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    job.kill()
    job.wait()
    server.delay = 0.0
    before = len(shards_read(server))
    assert main(line) == 0
    assert len(shards_read(server)) - before <= 4
    assert main(["wds", "--source", str(tmp_path / "bucket/in"), "--out", str(tmp_path / "local")]) == 0
    assert index_bytes(tmp_path / "out") == index_bytes(tmp_path / "local")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix == ".tar"]


def test_a_shard_that_is_replaced_while_it_is_indexed_is_an_error_with_its_name(
    server: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    names = ["--split", "train=train-{0000..0004}.tar"]
    line = ["wds", "--source", f"{server.url}/bucket/in", "--out", str(tmp_path / "out"), *names]
    server.deaf = True

    def replaced(path: Path) -> str:
        return f'"{len(server.log)}"'

    server.etag = replaced  # type: ignore[method-assign]
    assert main(line) == 1
    assert "was replaced" in capsys.readouterr().err
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_source_that_is_a_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["wds", "--source", "pipe:cat {}", "--out", str(tmp_path / "out")]) == 2
    assert "give --source another URL" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "show", "renew"])
def test_what_works_on_folders_refuses_a_url_as_one(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "https://host/train"]) == 2
    assert "https://host/train is a URL" in capsys.readouterr().err
