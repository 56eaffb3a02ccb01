"""Objects over HTTP, through the clients of S3, GCS and Azure, of the hub and of a pipe: every fault of the table, by a real
server on the loopback."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distill.data.remote import fetch
from distill.data.remote.fetch import Busy, Denied, Facts, FetchError, Missing, Remote, Replaced, Trip, read_object
from distill.data.remote.urls import is_url, remote_of
from tests.distill.data.remote.range_server import COMMIT, RangeServer

DATA = np.random.default_rng(0).bytes(100_000)
STORES = {"http": "", "s3": "s3://bucket/some", "gs": "gs://bucket/some", "az": "az://bucket/some"}
OF_EACH_STORE = pytest.mark.parametrize("kind", STORES)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    (tmp_path / "bucket" / "some").mkdir(parents=True)
    (tmp_path / "bucket" / "some" / "a b.tar").write_bytes(DATA)
    monkeypatch.setattr(fetch, "PART", 30_000)
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    with RangeServer(tmp_path) as running:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": running.url,
            "GOOGLE_SERVICE_ACCOUNT": str(tmp_path / "account.json"),
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": running.url,
            "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
            "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"a-secret").decode(),
        }.items():
            monkeypatch.setenv(name, value)
        account = {
            "gcs_base_url": running.url,
            "disable_oauth": True,
            "client_email": "",
            "private_key": "",
            "private_key_id": "",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        (tmp_path / "devstoreaccount1").symlink_to(tmp_path)  # Azure's emulator has the account in its paths
        yield running


def place(server: RangeServer, kind: str) -> Remote:
    if kind != "http":
        pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    return remote_of(STORES[kind] or f"{server.url}/bucket/some")


def fetched(remote: Remote, facts: Facts | None = None, name: str = "a b.tar") -> bytes:
    with tempfile.TemporaryFile() as file:
        remote.fetch(name, facts or remote.facts(name), file.fileno(), Trip())
        return os.pread(file.fileno(), 1 << 20, 0)


@OF_EACH_STORE
def test_an_object_comes_in_parts_of_one_version(server: RangeServer, kind: str):
    remote = place(server, kind)
    facts = remote.facts("a b.tar")
    assert facts.size == len(DATA)
    assert facts.etag == server.etag(server.folder / "bucket/some/a b.tar")
    assert fetched(remote, facts) == DATA
    assert sorted(asked for method, _, asked, _ in server.log if method == "GET") == [
        "bytes=0-29999",
        "bytes=30000-59999",
        "bytes=60000-89999",
        "bytes=90000-99999",
    ]


@OF_EACH_STORE
@pytest.mark.parametrize("fault", ["503", "500", "429", "cut", "short"])
def test_a_part_that_fails_is_fetched_again_and_said(
    server: RangeServer, kind: str, fault: str, caplog: pytest.LogCaptureFixture
):
    server.script.extend([fault, "", fault, fault])
    assert fetched(place(server, kind)) == DATA
    assert server.gets() == 4 + 3
    assert len([line for line in caplog.messages if "try" in line]) == 3


@OF_EACH_STORE
def test_a_store_that_stays_busy_is_given_up_with_its_name_and_last_answer(server: RangeServer, kind: str):
    server.script.extend(["503"] * 100)
    remote = place(server, kind)
    with pytest.raises(Busy, match=r"some/a b\.tar|some/a%20b\.tar") as error:
        fetched(remote)
    assert "503" in str(error.value)


@pytest.mark.parametrize("kind", ["http", "s3", "az"])  # GCS signs with an account's RSA key, which these tests have not
def test_retry_after_is_obeyed(server: RangeServer, kind: str, caplog: pytest.LogCaptureFixture):
    server.script.extend(["429:1"] * 4)
    started = time.monotonic()
    assert fetched(place(server, kind)) == DATA
    assert time.monotonic() - started >= 1
    assert [line[-8:] for line in caplog.messages] == ["in 1.0 s"] * 4
    assert sum(method == "SIGNED" for method, *_ in server.log) == (kind != "http"), "parts that wait together ask together"


def test_a_store_that_cannot_be_asked_when_to_come_again_is_tried_as_ever(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Without credentials nothing can be signed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    server.script.extend(["429:60"])
    assert fetched(place(server, "s3")) == DATA
    assert len(caplog.messages) == 1
    assert "60" not in caplog.text.rsplit("try", 1)[1]


@OF_EACH_STORE
def test_an_object_that_was_replaced_is_refused_with_both_etags(server: RangeServer, kind: str):
    remote = place(server, kind)
    facts = remote.facts("a b.tar")
    (server.folder / "bucket/some/a b.tar").write_bytes(DATA[::-1])
    now = server.etag(server.folder / "bucket/some/a b.tar")
    with pytest.raises(Replaced, match="index the shards again") as error:
        fetched(remote, facts)
    assert facts.etag in str(error.value)
    assert now in str(error.value)


@OF_EACH_STORE
def test_a_server_that_ignores_if_match_is_found_out_by_the_etag_of_its_answer(server: RangeServer, kind: str):
    remote = place(server, kind)
    facts = remote.facts("a b.tar")
    server.deaf, server.tags["a b.tar"] = True, '"new"'
    with pytest.raises(Replaced, match='"new"'):
        fetched(remote, facts)


@OF_EACH_STORE
@pytest.mark.parametrize("code", ["401", "403"])
def test_refused_credentials_are_not_tried_again_and_only_their_variables_are_named(server: RangeServer, kind: str, code: str):
    remote = place(server, kind)
    facts = remote.facts("a b.tar")
    server.always = code
    with pytest.raises(Denied) as error:
        remote.fetch("a b.tar", facts, os.open(server.folder / "x", os.O_RDWR | os.O_CREAT), Trip())
    assert all(fault == "" or method == "GET" for method, _, _, fault in server.log)
    named = {"http": "pipe:curl", "s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_SERVICE_ACCOUNT", "az": "AZURE_STORAGE_ACCOUNT_KEY"}
    assert named[kind] in str(error.value)
    assert "a-secret" not in str(error.value)
    assert server.gets() <= 4


def test_where_there_are_no_credentials_their_variables_are_named(server: RangeServer, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", server.url)  # a machine without a role
    with pytest.raises(FetchError, match="credentials are looked for in AWS_ACCESS_KEY_ID"):
        place(server, "s3").facts("a b.tar")


@OF_EACH_STORE
def test_an_object_that_is_not_there_is_named(server: RangeServer, kind: str):
    with pytest.raises(Missing, match="other"):
        place(server, kind).facts("other.tar")


def test_a_server_without_ranges_is_refused_with_the_command_that_reads_it(server: RangeServer):
    server.script.extend(["no ranges"] * 8)
    with pytest.raises(FetchError, match=r"pipe:curl"):
        fetched(place(server, "http"))


def test_a_closed_port_is_busy_not_a_traceback(server: RangeServer):
    with pytest.raises(Busy, match="no answer"):
        remote_of("http://127.0.0.1:9/x").facts("a")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl, which makes the certificate")
def test_a_certificate_of_ones_own_is_named_in_ssl_cert_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.tar").write_bytes(DATA)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(["openssl", *made.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = RangeServer(tmp_path)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    with secure:
        remote = remote_of(f"https://localhost:{secure.server_port}")
        with pytest.raises(FetchError, match=r"not trusted .*SSL_CERT_FILE"):
            remote.facts("a.tar")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetched(remote, name="a.tar") == DATA


def test_s3_is_listed_by_one_request(server: RangeServer):
    remote = place(server, "s3")
    assert remote.listing() == {"a b.tar": remote.facts("a b.tar")}
    assert place(server, "http").listing() is None


@pytest.mark.parametrize("url", ["s3://key:word@bucket/x", "https://host/x?X-Amz-Signature=abc", "https://me@host/x"])
def test_a_url_that_carries_credentials_is_refused_without_repeating_them(url: str):
    with pytest.raises(ValueError, match="environment") as error:
        remote_of(url)
    assert not re.search("key|word@|abc|me@", str(error.value))


def test_an_unknown_scheme_is_refused_with_those_there_are():
    for url in ("ftp://host/x", "HTTPS://key:word@host/x", "s3:/bucket/x"):
        assert is_url(url)  # no folder of that name is looked for, or made
        with pytest.raises(ValueError, match="s3://, gs://, az://") as error:
            remote_of(url)
        assert "word" not in str(error.value)
    assert not is_url("data/a:b")


@pytest.mark.parametrize(
    ("url", "said"),
    [("http://host:abc/x", "abc"), ("https://[::1/x", "IPv6"), ("http:///x", "no host"), ("s3:///x", "no bucket")],
)
def test_a_url_that_cannot_be_asked_is_refused_before_it_is(url: str, said: str):
    with pytest.raises(ValueError, match=f"^{url[:4].rstrip(':')}.*{said}"):
        remote_of(url)


def test_a_folder_with_a_space_in_its_name_is_read_as_it_is_typed_and_as_it_is_quoted(server: RangeServer):
    (server.folder / "my shards").mkdir()
    (server.folder / "my shards" / "a#b.tar").write_bytes(DATA)
    for folder in ("my shards", "my%20shards"):
        assert fetched(remote_of(f"{server.url}/{folder}"), name="a#b.tar") == DATA


def test_a_pipe_gives_the_object_that_its_braces_name(tmp_path: Path):
    (tmp_path / "a b.tar").write_bytes(DATA)
    assert fetched(remote_of(f"pipe:cat {tmp_path}/{{}}")) == DATA


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo no such bucket >&2; false {}", "no such bucket"),
        ("head -c 99999 {}", "99999 bytes came instead of 100000"),
        ("cat {} {}", "more than the 100000 bytes"),
    ],
)
def test_a_pipe_that_fails_is_told_by_its_exit_code_its_size_or_its_last_line(
    tmp_path: Path, command: str, said: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("a b.tar").write_bytes(DATA)
    with pytest.raises(FetchError, match=said):
        fetched(remote_of(f"pipe:{command}"), Facts(len(DATA)))


def test_a_pipe_that_fails_once_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    (tmp_path / "a b.tar").write_bytes(DATA)
    once = f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; head -c 5000 {tmp_path}/{{}}; exit 3; }}"
    assert fetched(remote_of(f"pipe:{once}; cat {tmp_path}/{{}}"), Facts(len(DATA))) == DATA


def test_a_pipe_that_fails_after_more_than_it_gives_in_the_end_leaves_none_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    once = f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; echo a page that says busy; exit 3; }}"
    assert read_object(remote_of(f"pipe:{once}; echo {{}}"), "name") == b"name\n"


def test_a_pipe_without_braces_is_refused():
    with pytest.raises(ValueError, match=r"has no \{\}"):
        remote_of("pipe:cat train.tar")


@pytest.fixture
def hub(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> RangeServer:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface-hub is not installed")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return server


def test_a_folder_of_the_hub_is_pinned_to_its_commit_and_an_object_is_one_request(hub: RangeServer):
    remote = remote_of("hf://datasets/org/name/bucket/some")
    (name, facts), *others = (remote.listing() or {}).items()
    assert (name, facts.size, facts.version, others) == ("a b.tar", len(DATA), COMMIT, [])
    assert remote.url == f"hf://datasets/org/name@{COMMIT}/bucket/some"
    before = hub.gets()
    assert fetched(remote, facts) == DATA
    assert hub.gets() == before + 1
    assert COMMIT in hub.log[-1][1]


def test_a_gated_data_set_is_refused_with_the_page_to_visit(hub: RangeServer):
    remote = remote_of("hf://datasets/org/name/bucket/some")
    hub.always = "403"
    with pytest.raises(Denied, match=r"gated.*/datasets/org/name.*HF_TOKEN"):
        remote.facts("a b.tar")


def test_a_body_of_the_hub_that_breaks_off_is_taken_up_again(hub: RangeServer, monkeypatch: pytest.MonkeyPatch):
    hub.script.extend(["cut"])
    assert fetched(remote_of("hf://datasets/org/name/bucket/some")) == DATA


def test_a_hub_that_must_not_be_asked_is_said(server: RangeServer, monkeypatch: pytest.MonkeyPatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface-hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="HF_HUB_OFFLINE"):
        remote_of("hf://datasets/org/name").listing()
