"""Preparation by its real command: deterministic bytes, what other readers make of them, and clear refusals."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from distill.data.index import ShardIndex
from tests.shards.preparing import command, file_hashes, image_bytes


def write_class(folder: Path, seeds: range) -> None:
    folder.mkdir(parents=True)
    for seed in seeds:
        (folder / f"img {seed:02d}.v1.jpg").write_bytes(image_bytes(seed))


@pytest.fixture
def images(tmp_path) -> Path:
    """train/ with 3 classes of 7 images, test/ with 2 of them."""
    root = tmp_path / "images"
    for number, name in enumerate(("zebra", "ant", "owl")):
        write_class(root / "train" / name, range(number * 10, number * 10 + 7))
    write_class(root / "test" / "owl", range(100, 104))
    write_class(root / "test" / "ant", range(110, 112))
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    return root


def test_a_folder_becomes_shards_that_hold_exactly_its_bytes(images, tmp_path):
    out = tmp_path / "out"
    done = command("folder", "--source", images, "--out", out, "--shards", 4)
    assert "train: 21 images, 4 shards" in done.stdout
    assert "val: 6 images, 2 shards" in done.stdout
    train, val = ShardIndex.open(out / "train"), ShardIndex.open(out / "val")
    assert train.class_names == val.class_names == ("ant", "owl", "zebra")
    assert np.bincount(train.labels).tolist() == [7, 7, 7]
    assert np.bincount(val.labels, minlength=3).tolist() == [2, 4, 0]
    assert sorted(shard.samples for shard in train.shards) == [5, 5, 5, 6]
    files = {path.read_bytes(): path.parent.name for path in (images / "train").rglob("*.jpg")}
    for sample in range(train.num_samples):
        record = train.records[sample]
        data = train.shard_path(int(record["shard"])).read_bytes()[record["offset"] : record["offset"] + record["size"]]
        assert files.pop(data) == train.class_names[record["label"]]
    assert not files
    assert json.loads((out / "train/manifest.json").read_text())["source_files_ignored"] == 1


def test_plain_webdataset_reads_what_the_index_says(images, tmp_path):
    command("folder", "--source", images / "train", "--out", tmp_path / "flat", "--shards", 2)
    index = ShardIndex.open(tmp_path / "flat")
    urls = [str(index.shard_path(shard)) for shard in range(2)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["cls"] for sample in samples] == index.labels.tolist()
    assert [sample["__key__"] for sample in samples] == [index.key(number) for number in range(21)]
    assert all("." not in index.key(number) and " " not in index.key(number) for number in range(21))


def test_timms_wds_reader_takes_the_shards(images, tmp_path):
    from timm.data import create_dataset

    out = tmp_path / "out"
    command("folder", "--source", images, "--out", out, "--shards", 2)
    dataset = create_dataset("wds/mine", root=str(out), split="val", is_training=False, batch_size=2)
    assert len(dataset) == 6
    labels = [label for _, label in dataset]
    assert sorted(labels) == sorted(ShardIndex.open(out / "val").labels.tolist())


def test_the_same_input_gives_the_same_bytes_on_any_number_of_workers(images, tmp_path):
    command("folder", "--source", images, "--out", tmp_path / "one", "--shards", 5)
    shutil.copytree(images, tmp_path / "copy" / "images")
    done = command("folder", "--source", "copy/images", "--out", "two", "--shards", 5, "--workers", 3, cwd=tmp_path)
    assert "img" not in done.stdout
    one, two = file_hashes(tmp_path / "one"), file_hashes(tmp_path / "two")
    one.pop("_info.json"), two.pop("_info.json")  # it names the folder
    assert one == two
    command("folder", "--source", images, "--out", tmp_path / "three", "--shards", 5, "--seed", 1)
    assert file_hashes(tmp_path / "three")["train/train-0000.tar"] != one["train/train-0000.tar"]


def test_digits_are_real_balanced_and_the_same_every_time(tmp_path):
    from sklearn.datasets import load_digits

    for name in ("one", "two"):
        done = command("digits", "--out", tmp_path / name)
    assert "train: 1,442 images" in done.stdout
    one, two = file_hashes(tmp_path / "one"), file_hashes(tmp_path / "two")
    one.pop("_info.json"), two.pop("_info.json")
    assert one == two
    train, val = (ShardIndex.open(tmp_path / "one" / name) for name in ("train", "val"))
    assert train.num_samples + val.num_samples == 1797
    counts = np.bincount(load_digits().target)
    for split, share in ((train, 0.8), (val, 0.2)):
        assert np.abs(np.bincount(split.labels) / counts - share).max() < 0.01
    keys = {index.key(number) for index in (train, val) for number in range(index.num_samples)}
    assert len(keys) == 1797
    record = val.records[0]
    data = val.shard_path(0).read_bytes()[record["offset"] : record["offset"] + record["size"]]
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == (32, 32, 3)
    scan = load_digits().images[int(val.key(0).removeprefix("digit"))]
    small = np.asarray(Image.fromarray(image[:, :, 0]).resize((8, 8), Image.Resampling.BOX), float)
    assert np.corrcoef(small.ravel(), scan.ravel())[0, 1] > 0.95


def test_prepared_again_it_does_nothing_and_says_so(images, tmp_path):
    out = tmp_path / "out"
    arguments = ("folder", "--source", images, "--out", out, "--shards", 2)
    command(*arguments)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    done = command(*arguments)
    assert done.stdout.count("was finished already") == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == before


def test_a_folder_that_holds_something_else_is_not_overwritten(images, tmp_path):
    out = tmp_path / "out"
    command("folder", "--source", images, "--out", out, "--shards", 2)
    before = file_hashes(out)
    other = command("folder", "--source", images, "--out", out, "--shards", 3, check=False)
    assert other.returncode == 2
    assert "num_shards 2 there, 3 now" in other.stderr
    (images / "train" / "ant" / "new.jpg").write_bytes(image_bytes(99))
    changed = command("folder", "--source", images, "--out", out, "--shards", 2, check=False)
    assert changed.returncode == 2
    assert "the source changed since" in changed.stderr
    assert "num_items 21 there, 22 now" in changed.stderr
    assert file_hashes(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("folder", "--source", "nowhere", "--out", "out"), "nowhere: not a folder"),
        (("folder", "--source", "empty", "--out", "out"), "empty: no class folders in it"),
        (
            ("folder", "--source", "hollow", "--out", "out", "--one-class"),
            "hollow: no images in folders of its 1 classes, as CLASS/NAME.jpg",
        ),
        (("folder", "--out", "out"), "the following arguments are required: --source; see --help"),
        (("folder", "--sorce", "empty", "--out", "out"), "--sorce: unknown option, did you mean --source?"),
        (("folder", "--source", "empty", "--out", "out", "--shards", "0"), "--shards: 0 is no whole number of at least 1"),
        (("folder", "--source", "empty", "--out", "out", "--shards", "x"), "--shards: x is no whole number of at least 1"),
        (("folder", "--source", "empty", "--out", "file"), "--out file: file is a file; give a folder"),
        (("folder", "--source", "empty", "--out", "file/below"), "--out file/below: file is a file; give a folder"),
        (("folder", "--source", "empty", "--out", ""), "--out: '' is no path"),
        (("wds", "--source", "empty", "--out", "out", "--class-names", "nowhere"), "--class-names nowhere: no such file"),
        (("show", "empty", "--sheet", "nowhere/sheet.png"), "--sheet nowhere/sheet.png: no file can be written there"),
        (("flowers", "--out", "out"), "COMMAND: invalid choice: 'flowers'"),
        (
            ("folder", "--source", "empty", "--out", "out", "--resize-short", "8", "--quality", "0"),
            "--quality: 0 is no whole number from 1 to 100",
        ),
        (("folder", "--source", "empty", "--out", "out", "--quality", "80"), "--quality 80: only with --resize-short"),
    ],
)
def test_bad_requests_get_one_clear_line_and_exit_code_2(arguments, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    (tmp_path / "file").touch()
    done = command(*arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_limit_takes_a_random_part_of_each_split(images, tmp_path):
    command("folder", "--source", images, "--out", tmp_path / "out", "--shard-size", 2, "--limit", 5)
    train, val = ShardIndex.open(tmp_path / "out/train"), ShardIndex.open(tmp_path / "out/val")
    assert ([shard.samples for shard in train.shards], val.num_samples) == ([1, 2, 2], 5)
    assert len(set(train.labels.tolist())) > 1
    assert train.num_classes == 3


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(images, tmp_path):
    done = command("folder", "--source", images, "--out", tmp_path / "out", "--shards", 2, "--dry-run")
    assert "train: 21 images of 3 classes would go into 2 shards" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_no_clean_image_is_quarantined_or_repaired_and_counted(images, tmp_path):
    folder = images / "train" / "ant"
    good = image_bytes(50)
    (folder / "cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "none.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>404</html>")
    (folder / "really_png.jpg").write_bytes(image_bytes(51, kind="PNG"))
    cmyk = io.BytesIO()
    Image.open(io.BytesIO(good)).convert("CMYK").save(cmyk, "JPEG")
    (folder / "print.jpg").write_bytes(cmyk.getvalue())
    done = command("folder", "--source", images, "--out", tmp_path / "out", "--shards", 2, "--max-refused", 12)
    assert "train: 23 images" in done.stdout
    assert "3 refused, 1 notes" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["source"]).name for line in lines} == {"cut.jpg", "none.jpg", "page.jpg"}
    assert all(line["reason"] and line["key"] for line in lines)
    index = ShardIndex.open(tmp_path / "out/train")
    by_key = {index.key(number): index.records[number] for number in range(index.num_samples)}
    record = by_key["ant_print"]
    data = index.shard_path(int(record["shard"])).read_bytes()[record["offset"] : record["offset"] + record["size"]]
    repaired = Image.open(io.BytesIO(data))
    assert repaired.format == "PNG"
    assert np.array_equal(np.asarray(repaired), np.asarray(Image.open(cmyk).convert("RGB")))


def pixels_of(index: ShardIndex, sample: int) -> tuple[bytes, Image.Image]:
    record = index.records[sample]
    with index.shard_path(int(record["shard"])).open("rb") as file:
        file.seek(int(record["offset"]))
        data = file.read(int(record["size"]))
    return data, Image.open(io.BytesIO(data))


SIZES = {"wide": (60, 100), "tall": (100, 60), "small": (20, 90), "square": (64, 64)}
"""Height and width of the images that are to be shrunk to a shorter side of 32: `small` is smaller already."""


@pytest.fixture
def large(tmp_path) -> Path:
    root = tmp_path / "large"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for number, (name, size) in enumerate(SIZES.items()):
            smooth = Image.open(io.BytesIO(image_bytes(number, (4, 4), "PNG"))).resize(size[::-1], Image.Resampling.BICUBIC)
            smooth.save(root / split / "a" / f"{name}.jpg", quality=95)
    Image.open(root / "train/a/wide.jpg").convert("L").save(root / "train/a/grey.jpg", quality=90)
    return root


def test_larger_training_images_are_shrunk_on_request_and_those_of_val_are_not(large, tmp_path):
    shrunk = ("--shards", 2, "--resize-short", 32, "--quality", 80)
    command("folder", "--source", large, "--out", tmp_path / "out", *shrunk, "--one-class")
    train, val = ShardIndex.open(tmp_path / "out/train"), ShardIndex.open(tmp_path / "out/val")
    sizes = {}
    for sample in range(train.num_samples):
        data, image = pixels_of(train, sample)
        name = train.key(sample).removeprefix("a_")
        sizes[name] = (image.height, image.width)
        original = Image.open(large / f"train/a/{name}.jpg")
        if name == "small":
            assert data == (large / "train/a/small.jpg").read_bytes()
        else:
            expected = np.asarray(original.convert("RGB").resize(image.size, Image.Resampling.BICUBIC), float)
            assert np.abs(np.asarray(image, float) - expected).mean() < 5
    assert sizes == {"wide": (32, 53), "tall": (53, 32), "small": (20, 90), "square": (32, 32), "grey": (32, 53)}
    for sample in range(val.num_samples):
        assert pixels_of(val, sample)[0] == (large / f"val/a/{val.key(sample).removeprefix('a_')}.jpg").read_bytes()
    assert json.loads((tmp_path / "out/train/manifest.json").read_text())["plan"]["resize_short"] == 32


def test_shrunk_images_are_the_same_bytes_on_any_number_of_workers_and_smaller_at_lower_quality(large, tmp_path):
    arguments = ("folder", "--source", large, "--shards", 3, "--resize-short", 32, "--one-class")
    command(*arguments, "--out", tmp_path / "one")
    command(*arguments, "--out", tmp_path / "two", "--workers", 2)
    one, two = file_hashes(tmp_path / "one"), file_hashes(tmp_path / "two")
    one.pop("_info.json"), two.pop("_info.json")
    assert one == two
    command(*arguments, "--out", tmp_path / "low", "--quality", 40)
    high, low = (ShardIndex.open(tmp_path / name / "train").records["size"].sum() for name in ("one", "low"))
    assert low < high
