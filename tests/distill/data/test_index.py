"""The shard index: what is written is what is read, and what does not fit is refused by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from distill.data.index import RECORD, ShardIndex, ShardInfo, write_split
from distill.data.pixels import decode
from distill.data.reader import BadSample, SampleReader, ShardLost
from distill.data.reference import read_sample

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def split(make_split, tmp_path) -> Path:
    """A copy of a split, to be damaged."""
    return Path(shutil.copytree(make_split().folder, tmp_path / "split"))


def test_a_record_takes_at_most_28_bytes():
    assert RECORD.itemsize <= 28


def test_what_is_written_is_what_is_read(tmp_path):
    rng = np.random.default_rng(0)
    records = np.zeros(100, RECORD)
    for name in RECORD.names:
        records[name] = rng.integers(0, 2**16, 100)
    (tmp_path / "a.tar").write_bytes(b"x" * 10)
    write_split(tmp_path, [ShardInfo("a.tar", 100, 10, "00")], records, ["one", "zwei", "тpи"], extra={"origin": "here"})
    index = ShardIndex.open(tmp_path)
    assert np.array_equal(index.records, records)
    assert isinstance(index.records, np.memmap)
    assert index.num_samples == 100
    assert index.class_names == ("one", "zwei", "тpи")
    assert index.num_classes == 3
    assert index.manifest["origin"] == "here"
    assert np.array_equal(index.labels, records["label"])


def test_the_index_agrees_with_tarfile(make_split):
    """Offsets, sizes, labels and keys as Python's own tar reader finds them."""
    index = make_split()
    found = []
    for shard in range(len(index.shards)):
        with tarfile.open(index.shard_path(shard)) as tar:
            members = tar.getmembers()
        assert all(member.mtime == 0 for member in members)
        for label, image in zip(members[::2], members[1::2], strict=True):
            assert label.name == image.name.split(".")[0] + ".cls"
            found.append((image.name.split(".")[0], shard, image.offset_data, image.size))
    ours = [
        (index.key(i), *(int(index.records[i][name]) for name in ("shard", "offset", "size"))) for i in range(index.num_samples)
    ]
    assert ours == found


def test_reader_and_webdataset_read_the_same_bytes(make_split):
    index = make_split()
    reader = SampleReader(index)
    for sample in range(index.num_samples):
        data = reader.read(sample)
        assert data.tobytes() == read_sample(index, sample)
        image = decode(data.tobytes())
        assert tuple(index.sizes(sample)) == (image.height, image.width)
    reader.close()
    reader.close()


def test_a_missing_folder_or_split_is_refused_with_the_remedy(split, tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder; make it with `python shards/prepare.py"):
        ShardIndex.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"its splits are split: name one of them"):
        ShardIndex.open(tmp_path)
    (split / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest.json in it, so this is no finished split"):
        ShardIndex.open(split)


def test_a_missing_shard_is_refused_by_name(split):
    (split / "train-0001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-0001.tar: shard is missing"):
        ShardIndex.open(split)


def test_a_truncated_shard_is_refused_with_both_sizes(split):
    path = split / "train-0002.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(ValueError, match=rf"train-0002.tar: shard has {size - 700} bytes, the manifest says {size}"):
        ShardIndex.open(split)


def test_a_shard_replaced_by_one_of_the_same_size_is_found_before_the_first_step(split):
    path = split / "train-0000.tar"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=r"train-0000.tar: its first, middle and last image do not have the checksums"):
        ShardIndex.open(split).spot_check()


def test_one_damaged_image_at_the_front_of_a_shard_does_not_keep_a_run_from_starting(split):
    index = ShardIndex.open(split)
    with index.shard_path(0).open("r+b") as file:
        file.seek(int(index.records[0]["offset"]))
        file.write(bytes(100))
    ShardIndex.open(split).spot_check()


def test_an_index_of_another_preparation_is_refused(split):
    path = split / "index.npy"
    path.write_bytes(path.read_bytes()[: -RECORD.itemsize])
    with pytest.raises(ValueError, match=r"index.npy: sha256 .*, the manifest says"):
        ShardIndex.open(split)


def test_a_changed_byte_is_found_by_the_reader(split):
    index = ShardIndex.open(split)
    record = index.records[4]
    with index.shard_path(int(record["shard"])).open("r+b") as file:
        file.seek(int(record["offset"]) + 200)
        file.write(b"\x00\x01\x02")
    reader = SampleReader(index)
    with pytest.raises(BadSample, match=r"checksum .* the bytes changed on disk"):
        reader.read(4)
    reader.read(5)


def test_a_shard_that_shrinks_after_the_start_is_an_error_with_its_name_not_a_crash(split):
    index = ShardIndex.open(split)
    reader = SampleReader(index)
    reader.read(0)
    path = index.shard_path(0)
    with path.open("r+b") as file:
        file.truncate(600)
    with pytest.raises(ShardLost, match=rf"{path}: .* the shard was truncated after the start"):
        reader.read(0)
    index.shard_path(1).unlink()
    sample = int(np.flatnonzero(index.records["shard"] == 1)[0])
    with pytest.raises(ShardLost, match=r"train-0001.tar: cannot be read any more \(No such file"):
        reader.read(sample)


def read_all(folder: Path, files: int, hard: int) -> str:
    """What a process prints that reads every sample where it may open so many files, and `hard` at most."""
    script = (
        "import os, resource, sys\n"
        "from distill.data.index import ShardIndex\n"
        "from distill.data.reader import SampleReader\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {hard}))\n"
        "index = ShardIndex.open(sys.argv[1])\n"
        "reader = SampleReader(index)\n"
        "for sample in range(index.num_samples): reader.read(sample)\n"
        "print(len(os.listdir('/proc/self/fd')) > 30)\n"
        "reader.close()\n"
        "print(len(os.listdir('/proc/self/fd')) < 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_more_shards_than_a_process_may_open_are_read(make_split):
    """ImageNet has 1,025 shards and many systems allow 1,024 open files: the run used to stop in its first epoch."""
    folder = make_split(count=40, shards=40).folder
    assert read_all(folder, files=30, hard=4096).split() == ["True", "True"]
    assert read_all(folder, files=30, hard=30).split() == ["False", "True"]
