"""A split that an earlier version prepared is refused with the command that renews it, and that command does."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill.data.index import RECORD, ShardIndex
from distill.files import file_sha256
from shards.prepare import main
from shards.renew import renew_split
from tests.shards.preparing import command, file_hashes


@pytest.fixture(scope="module")
def present(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("present") / "digits"
    command("digits", "--out", out, "--limit", 60)
    return out


@pytest.fixture
def old(present: Path, tmp_path: Path) -> Path:
    """The same splits as the version before left them: format 1, an index of 24 bytes a sample."""
    out = Path(shutil.copytree(present, tmp_path / "digits"))
    for split in ("train", "val"):
        make_old(out / split)
    return out


def make_old(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    records = np.load(folder / "index.npy")
    narrow = np.zeros(len(records), np.dtype(RECORD.descr[:5]))
    for name in narrow.dtype.names:
        narrow[name] = records[name]
    assert narrow.dtype.itemsize == 24
    np.save(folder / "index.npy", narrow)
    manifest |= {"format": 1, "index_sha256": file_sha256(folder / "index.npy")}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def manifests(out: Path) -> list[str]:
    return [(out / split / "manifest.json").read_text() for split in ("train", "val")]


def test_the_message_names_a_command_that_makes_the_split_what_it_would_be_now(old, present):
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"has no image sizes; run `python shards/prepare\.py renew") as refused:
            ShardIndex.open(old / split)
        assert len(str(refused.value).splitlines()) == 1
        (line,) = re.findall("`(.*)`", str(refused.value))
        interpreter, _, *arguments = shlex.split(line)
        assert interpreter == "python"
        command(*arguments)
        assert ShardIndex.open(old / split).sizes(3).tolist() == [32, 32]
    assert (file_hashes(old), manifests(old)) == (file_hashes(present), manifests(present))
    assert "already" in command("renew", old).stdout


def test_prepared_again_by_the_same_command_it_is_renewed_and_its_shards_are_kept(old, present):
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*.tar")}
    command("digits", "--out", old, "--limit", 60)
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*.tar")} == before
    assert (file_hashes(old), manifests(old)) == (file_hashes(present), manifests(present))


def test_killed_between_index_and_manifest_it_is_renewed_the_next_time(old, present):
    shutil.copy(present / "train/index.npy", old / "train/index.npy")
    assert renew_split(old / "train", progress=False)
    assert manifests(old)[0] == manifests(present)[0]


def test_damaged_shards_and_indexes_are_not_renewed(old):
    manifest = (old / "train/manifest.json").read_text()
    index = (old / "train/index.npy").read_bytes()
    (old / "train/index.npy").write_bytes(index[:-5] + bytes(5))
    with pytest.raises(ValueError, match="its sha256 is not the manifest's; prepare the split again"):
        renew_split(old / "train", progress=False)
    (old / "train/index.npy").write_bytes(index)
    shard = old / "train/train-0001.tar"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match=r"train-0001.tar: the image at offset \d+ is damaged"):
        renew_split(old / "train", progress=False)
    assert (old / "train/manifest.json").read_text() == manifest


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("manifest.json", b"[]", "manifest.json: damaged (no format in it)"),
        ("manifest.json", b"{}", "manifest.json: damaged (no format in it)"),
        ("manifest.json", b"no JSON", "manifest.json: not readable as JSON"),
        ("manifest.json", b'{"format": 99}', "manifest.json: format 99, this version reads 2"),
        ("manifest.json", b'{"format": 1}', "manifest.json: damaged (KeyError: 'shards')"),
        ("manifest.json", b'{"format": 1, "shards": [{}]}', "manifest.json: damaged (TypeError: "),
        ("manifest.json", b'{"format": 2}', "manifest.json: damaged (KeyError: "),
        ("index.npy", None, "index.npy: not readable ([Errno 2] No such file or directory"),
        ("index.npy", b"", "index.npy: not readable (No data left in file)"),
        ("index.npy", b"no rows", "index.npy: not readable (This file contains pickled"),
    ],
)
def test_a_damaged_split_is_refused_in_one_line_with_the_remedy(old, name, content, said, capsys):
    """It used to be a traceback, and format 99 was called the present one."""
    path = old / "train" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert main(["renew", str(old / "train")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {old / 'train'}/{said}")
    assert line.endswith("; prepare the split again")


def test_rows_of_an_unfinished_preparation_of_an_earlier_version_are_made_again(tmp_path, present):
    """56 samples of 24 bytes are as long as 48 of 28: read as such they would be nonsense without an error."""
    out = tmp_path / "digits"
    command("digits", "--out", out, "--limit", 60)
    split = out / "train"
    manifest = json.loads((split / "manifest.json").read_text())
    (split / ".parts").mkdir()
    (split / ".parts/plan.json").write_text(json.dumps(manifest["plan"]))
    for number, shard in enumerate(manifest["shards"]):
        marker = {"number": number, "shard": shard, "read_bytes": 0, "read_samples": shard["samples"]}
        (split / f".parts/{number}.json").write_text(json.dumps(marker))
        (split / f".parts/{number}.rows").write_bytes(bytes(24 * shard["samples"]))
    (split / "manifest.json").unlink()
    command("digits", "--out", out, "--limit", 60)
    assert file_hashes(out) == file_hashes(present)
