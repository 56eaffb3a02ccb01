"""Killed, changed, full, damaged: started again it ends with the same bytes, and nothing unfinished looks finished."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from distill.data.index import ShardIndex
from shards.items import FileRef, Item, RangeRef, SourceChanged
from shards.jobs import ShardJob
from shards.writer import write_shard
from tests.shards.preparing import ROOT, command, file_hashes, image_bytes

SHARDS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("many") / "images"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for number in range(150):
            (root / name / f"{number:03d}.jpg").write_bytes(image_bytes(number + ord(name) * 1000, (150, 150)))
    return root


@pytest.fixture(scope="module")
def expected(images, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    command("folder", "--source", images, "--out", out, "--shards", SHARDS)
    return file_hashes(out)


def start(images: Path, out: Path, workers: int = 1) -> subprocess.Popen[bytes]:
    line = [sys.executable, str(ROOT / "shards/prepare.py"), "folder", "--source", str(images), "--out", str(out)]
    line += ["--shards", str(SHARDS), "--workers", str(workers)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_shards(process: subprocess.Popen[bytes], out: Path, count: int) -> None:
    """Returns when so many shards have markers, or the process has ended."""
    while process.poll() is None and marked(out) <= count:
        time.sleep(0.002)


def marked(out: Path) -> int:
    """Number of shards with markers, whose folder is not there before the first and goes when all are done."""
    try:
        return sum(name.endswith(".json") for name in os.listdir(out / ".parts"))
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_ends_with_the_same_bytes(workers, images, expected, tmp_path):
    """Each kill comes at a random moment after at least one more shard was finished."""
    rng = random.Random(workers)
    out = tmp_path / "out"
    kills = 0
    while True:
        done = marked(out)
        process = start(images, out, workers)
        wait_for_shards(process, out, done + rng.randrange(6))
        time.sleep(rng.random() * 0.02)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        process.kill()
        process.wait()
        kills += 1
        assert (out / "manifest.json").exists() or kills < 40
        if (out / "manifest.json").exists():
            break
    assert kills >= 3
    command("folder", "--source", images, "--out", out, "--shards", SHARDS)
    assert file_hashes(out) == expected


def test_a_killed_worker_loses_nothing(images, expected, tmp_path):
    out = tmp_path / "out"
    process = start(images, out, workers=2)
    wait_for_shards(process, out, 2)
    victims = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert victims
    victims[0].send_signal(signal.SIGKILL)
    assert process.wait() == 0, process.stderr.read()
    assert file_hashes(out) == expected


def test_a_source_that_changed_between_two_starts_is_refused(images, tmp_path):
    import shutil

    copy = Path(shutil.copytree(images, tmp_path / "images"))
    out = tmp_path / "out"
    process = start(copy, out)
    wait_for_shards(process, out, 3)
    process.kill()
    process.wait()
    assert not (out / "manifest.json").exists()
    (copy / "a" / "000.jpg").write_bytes(image_bytes(7, (150, 150)))
    done = command("folder", "--source", copy, "--out", out, "--shards", SHARDS, check=False)
    assert done.returncode == 2
    assert "the source changed since" in done.stderr


def test_a_file_that_changes_while_it_is_prepared_leaves_no_shard(tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(image_bytes(1))
    stat = path.stat()
    (tmp_path / ".parts").mkdir()
    job = ShardJob(str(tmp_path), 0, "train-0000.tar", [Item("x", 0, FileRef(str(path), stat.st_size, stat.st_mtime_ns))])
    path.write_bytes(image_bytes(2))
    with pytest.raises(SourceChanged, match=r"x.jpg: changed while it was prepared"):
        write_shard(job)
    assert {entry.name for entry in tmp_path.iterdir()} == {"x.jpg", ".parts"}
    assert not list((tmp_path / ".parts").iterdir())


def test_an_archive_that_changes_while_it_is_prepared_leaves_no_shard(tmp_path):
    path = tmp_path / "archive.tar"
    path.write_bytes(image_bytes(1))
    (tmp_path / ".parts").mkdir()
    ref = RangeRef(str(path), 0, path.stat().st_size, "x.jpg", path.stat().st_mtime_ns)
    os.utime(path, ns=(0, ref.mtime_ns + 1))
    with pytest.raises(SourceChanged, match=r"archive.tar: changed while it was prepared"):
        write_shard(ShardJob(str(tmp_path), 0, "train-0000.tar", [Item("x", 0, ref)]))
    assert {entry.name for entry in tmp_path.iterdir()} == {"archive.tar", ".parts"}


def test_an_unreadable_source_file_is_an_error_with_its_name(tmp_path):
    (tmp_path / "images/cat").mkdir(parents=True)
    (tmp_path / "images/cat/good.jpg").write_bytes(image_bytes(1))
    (tmp_path / "images/cat/gone.jpg").symlink_to(tmp_path / "nowhere")
    done = command("folder", "--source", tmp_path / "images", "--out", tmp_path / "out", "--one-class", check=False)
    assert done.returncode == 1
    assert "gone.jpg" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_write_that_fails_leaves_nothing_that_looks_finished(images, expected, tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails in the middle of a shard."""
    out = tmp_path / "out"
    line = [sys.executable, str(ROOT / "shards/prepare.py"), "folder", "--source", str(images), "--out", str(out)]
    done = subprocess.run(
        [*line, "--shards", str(SHARDS)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.glob("*.tar"))
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="no finished split"):
        ShardIndex.open(out)
    command("folder", "--source", images, "--out", out, "--shards", SHARDS)
    assert file_hashes(out) == expected


def test_two_preparations_do_not_write_into_one_folder(images, tmp_path):
    out = tmp_path / "out"
    first = start(images, out)
    wait_for_shards(first, out, 0)
    second = command("folder", "--source", images, "--out", out, "--shards", SHARDS, check=False)
    if first.poll() is None or second.returncode != 0:
        assert second.returncode == 2
        assert "another preparation is writing there" in second.stderr
    assert first.wait() == 0


@pytest.fixture
def prepared(images, tmp_path) -> Path:
    command("folder", "--source", images, "--out", tmp_path / "out", "--shards", 4)
    return tmp_path / "out"


def defects(folder: Path, *options: str) -> list[str]:
    done = command("verify", folder, *options, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == (0 if lines[-1].endswith("no defects") else 1)
    return lines[:-1]


def test_verify_finds_nothing_in_a_good_split_and_names_each_defect_of_a_bad_one(prepared):
    assert defects(prepared, "--full") == []
    index = ShardIndex.open(prepared)
    flipped, cut, gone = (index.shard_path(number) for number in (0, 1, 2))
    record = index.records[5]
    with flipped.open("r+b") as file:
        file.seek(int(record["offset"]) + 1000)
        file.write(bytes(500))
    cut.write_bytes(cut.read_bytes()[:-100_000])
    gone.unlink()
    found = defects(prepared, "--full")
    assert any(line.startswith(f"{flipped}: sha256") for line in found)
    assert any(f"{index.key(5)}.jpg at offset {record['offset']}: checksum" in line for line in found)
    assert any(line.startswith(f"{cut}: ") and "the manifest says" in line for line in found)
    assert any(line.startswith(f"{cut}: ") and "truncated" in line for line in found)
    assert f"{gone}: missing" in found


def test_verify_finds_an_index_that_lies(prepared):
    path = prepared / "index.npy"
    records = np.load(path)
    records["offset"][3] += 512
    records["label"][9] = 1 - records["label"][9]
    np.save(path, records)
    assert "index.npy: sha256" in defects(prepared)[0]
    import json

    from distill.files import file_sha256

    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["index_sha256"] = file_sha256(path)
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    found = defects(prepared)
    assert len(found) == 2
    assert "no member of" in found[0]
    assert "where the index has one" in found[0]
    assert ".cls says" in found[1]


def test_show_tells_counts_and_draws_a_sheet_with_the_images(prepared):
    from PIL import Image

    done = command("show", prepared, "--images", 8)
    assert "300 images of 2 classes" in done.stdout
    assert "images a class: 150 to 150" in done.stdout
    sheet = np.asarray(Image.open(prepared / "sheet.png"))
    assert sheet.shape == (126, 896, 3)
    for tile in range(8):
        assert sheet[20:90, tile * 112 + 20 : tile * 112 + 90].std() > 5


def test_killed_between_the_manifest_and_the_tidying_it_tidies_when_started_again(images, expected, tmp_path):
    out = tmp_path / "out"
    command("folder", "--source", images, "--out", out, "--shards", SHARDS)
    (out / ".parts").mkdir()
    (out / ".parts" / "0.json").write_text("{}")
    (out / ".train-0000.tar.1.aside").write_bytes(b"half")
    command("folder", "--source", images, "--out", out, "--shards", SHARDS)
    assert file_hashes(out) == expected
