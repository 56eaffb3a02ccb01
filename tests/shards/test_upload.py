"""A preparation into a bucket: what lies there is what a folder would hold, whatever happens on the way."""

from __future__ import annotations

import json
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
from tests.distill.data.remote.range_server import RangeServer
from tests.shards.preparing import ROOT, image_bytes

pytest.importorskip("obstore", reason="the extra `remote` is not installed")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    for number in range(24):
        path = tmp_path / "images" / ("train", "val")[number % 4 == 3] / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    (tmp_path / "store/bucket").mkdir(parents=True)
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    with RangeServer(tmp_path / "store") as running:
        known = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "a-secret", "REGION": "eu-west-7", "ENDPOINT_URL": running.url}
        for name, value in known.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        yield running


def line(tmp_path: Path, out: object, *more: str) -> list[str]:
    source = tmp_path / "images"
    for part in ("train", "val"):  # val has a class of odd numbers only
        (source / part / "a").mkdir(exist_ok=True)
    return ["folder", "--source", str(source), "--out", str(out), "--shards", "6", *more]


def files(folder: Path) -> dict[str, bytes]:
    names = [path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".npy")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def test_a_bucket_holds_what_a_folder_would_and_no_shard_stays_here(server: RangeServer, tmp_path: Path):
    server.uploads.extend(["503", "", "503"])
    assert main(line(tmp_path, "s3://bucket/mine")) == 0
    assert main(line(tmp_path, tmp_path / "local")) == 0
    there = tmp_path / "store/bucket/mine"
    assert files(there) == files(tmp_path / "local")
    assert not list((tmp_path / "caches").rglob("*.tar"))
    assert (there / "_info.json").exists()
    manifest = (there / "train/manifest.json").read_text()
    assert json.loads(manifest)["root"] == "s3://bucket/mine/train"
    assert "a-secret" not in manifest
    index = ShardIndex.open("s3://bucket/mine/train", tmp_path / "cache")
    assert all(shard.etag for shard in index.shards)
    assert len([SampleReader(index).read(sample) for sample in range(index.num_samples)]) == 18
    uploads = [path for method, path, _, fault in server.log if method == "PUT" and not fault]
    assert uploads.index("/bucket/mine/train/manifest.json") > max(n for n, path in enumerate(uploads) if "train-" in path)
    assert main(line(tmp_path, "s3://bucket/mine")) == 0
    assert sum(method == "PUT" and path.endswith(".tar") and not fault for method, path, _, fault in server.log) == 8


def test_a_preparation_that_is_killed_uploads_what_is_missing(server: RangeServer, tmp_path: Path):
    server.delay = 0.15
    job = subprocess.Popen(
        [sys.executable, "shards/prepare.py", *line(tmp_path, "s3://bucket/mine")], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    there, end = tmp_path / "store/bucket/mine", time.monotonic() + 60
    while len(list(there.rglob("*.tar"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    job.kill()
    job.wait()
    assert not list(there.rglob("manifest.json"))
    server.delay = 0.0
    assert main(line(tmp_path, "s3://bucket/mine")) == 0
    assert main(line(tmp_path, tmp_path / "local")) == 0
    assert files(there) == files(tmp_path / "local")


def test_what_others_keep_in_the_bucket_is_not_overwritten(
    server: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    foreign = tmp_path / "store/bucket/mine/train/train-0002.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"theirs")
    assert main(line(tmp_path, "s3://bucket/mine")) == 2
    assert "train-0002.tar: is there, and no preparation here says" in capsys.readouterr().err
    assert foreign.read_bytes() == b"theirs"
    foreign.unlink()
    assert main(line(tmp_path, "s3://bucket/mine")) == 0
    assert main(line(tmp_path, "s3://bucket/mine", "--seed", "1")) == 2
    assert "give another --out" in capsys.readouterr().err


def test_a_bucket_that_may_not_be_written_is_an_error_with_its_name_and_no_manifest(
    server: RangeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    server.uploads.extend(["", "403"])
    assert main(line(tmp_path, "s3://bucket/mine")) == 1
    assert "s3://bucket/mine/train/train-0001.tar: access denied" in capsys.readouterr().err
    assert not list((tmp_path / "store").rglob("manifest.json"))
    assert main(line(tmp_path, "s3://bucket/mine")) == 0


def test_a_url_that_cannot_be_written_to_is_refused(tmp_path: Path, server: RangeServer, capsys: pytest.CaptureFixture[str]):
    assert main(line(tmp_path, f"{server.url}/mine")) == 2
    assert "only s3://, gs:// and az:// can be written to" in capsys.readouterr().err
