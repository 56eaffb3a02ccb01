"""S3 as the moto server has it: versions, ETags of uploads in several parts, a bucket without the right to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.data.remote.buckets import ObjectRemote
from distill.data.remote.fetch import Facts, Missing, Replaced, Trip
from distill.data.remote.urls import remote_of

pytest.importorskip("obstore", reason="the extra `remote` is not installed")
moto = pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[server,s3]'")

SMALL = [np.random.default_rng(seed).bytes(70_000) for seed in range(2)]
LARGE = np.random.default_rng(2).bytes(12 << 20)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import boto3

    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "testing")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client
    server.stop()


def fetched(url: str, name: str, facts: Facts) -> bytes:
    with tempfile.TemporaryFile() as file:
        remote_of(url).fetch(name, facts, file.fileno(), Trip())
        return os.pread(file.fileno(), 1 << 28, 0)


def test_an_object_of_several_parts_is_read_whole_and_listed_with_its_etag(s3: Any):
    s3.put_object(Bucket="bucket", Key="in/small.tar", Body=SMALL[0])
    upload = s3.create_multipart_upload(Bucket="bucket", Key="in/large.tar")["UploadId"]
    parts = []
    for number, data in enumerate((LARGE[: 6 << 20], LARGE[6 << 20 :]), 1):
        part = s3.upload_part(Bucket="bucket", Key="in/large.tar", PartNumber=number, UploadId=upload, Body=data)
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    s3.complete_multipart_upload(Bucket="bucket", Key="in/large.tar", UploadId=upload, MultipartUpload={"Parts": parts})
    remote = remote_of("s3://bucket/in")
    listed = remote.listing() or {}
    assert {name: facts.size for name, facts in listed.items()} == {"small.tar": len(SMALL[0]), "large.tar": len(LARGE)}
    assert listed["large.tar"] == remote.facts("large.tar")
    assert listed["large.tar"].etag.endswith('-2"')
    assert fetched("s3://bucket/in", "large.tar", listed["large.tar"]) == LARGE


def test_a_large_file_is_uploaded_in_parts(s3: Any, tmp_path: Path):
    (tmp_path / "large").write_bytes(LARGE)
    remote = remote_of("s3://bucket/out")
    assert isinstance(remote, ObjectRemote)
    facts = remote.put("large.tar", tmp_path / "large")
    assert facts.etag.endswith('-3"')
    assert fetched("s3://bucket/out", "large.tar", facts) == LARGE


def test_a_replaced_object_is_refused_and_of_a_bucket_with_versions_the_indexed_one_is_read(s3: Any):
    s3.put_object(Bucket="bucket", Key="a.tar", Body=SMALL[0])
    facts = remote_of("s3://bucket").facts("a.tar")
    s3.put_object(Bucket="bucket", Key="a.tar", Body=SMALL[1])
    with pytest.raises(Replaced):
        fetched("s3://bucket", "a.tar", facts)
    s3.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})
    s3.put_object(Bucket="bucket", Key="b.tar", Body=SMALL[0])
    facts = remote_of("s3://bucket").facts("b.tar")
    assert facts.version
    s3.put_object(Bucket="bucket", Key="b.tar", Body=SMALL[1])
    assert fetched("s3://bucket", "b.tar", facts) == SMALL[0]


def test_a_bucket_that_is_not_there_is_said(s3: Any):
    with pytest.raises(Missing, match="s3://nobody"):
        remote_of("s3://nobody").facts("a.tar")
