"""Sources and folders as nobody wants them: each of these used to stop a preparation, to lose images, or to pass unseen."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from distill.data.index import RECORD, ShardIndex, write_split
from shards.archives import imagenet_source
from shards.folders import folder_source
from shards.images import Unclean, clean_image
from shards.items import FileRef, unique_keys
from shards.prepare import main
from shards.splits import find_splits
from tests.distill.data.planting import encoded
from tests.shards.preparing import command, image_bytes
from tests.shards.test_sources import add, write_cub200


def told(folder: Path, name: str) -> dict[str, str]:
    """Reason or note by key."""
    entries = [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
    return {entry["key"]: entry.get("reason", entry.get("note")) for entry in entries}


def png16(channels: int) -> bytes:
    rows = np.random.default_rng(0).integers(0, 256, (8, 1 + 8 * 2 * channels), dtype=np.uint8)
    rows[:, 0] = 0
    header = struct.pack(">IIBBBBB", 8, 8, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bits_a_channel_become_8_in_colour_too(channels):
    """Kept as they were, DALI and PIL rounded them to different levels."""
    clean = clean_image(png16(channels))
    assert clean.notes[-1] == "16-bit re-encoded as 8-bit PNG"
    assert clean.data[24] == 8


def test_pixels_without_a_known_white_are_refused_instead_of_becoming_black():
    levels = np.linspace(0, 1, 64).reshape(8, 8)
    for pixels in (levels.astype(np.float32), (levels * 255).astype(np.int32)):
        with pytest.raises(Unclean, match="32-bit pixels"):
            clean_image(encoded(Image.fromarray(pixels), "TIFF"))


def test_an_image_too_long_for_a_jpeg_is_refused_alone():
    long = encoded(Image.new("RGB", (99_000, 3)), "PNG")
    with pytest.raises(Unclean, match="cannot be encoded"):
        clean_image(long, resize_short=2)
    with pytest.raises(Unclean, match="3 x 99000 pixels: a side may have 65535, as in a JPEG"):
        clean_image(long)
    assert clean_image(encoded(Image.new("RGB", (65_535, 3)), "PNG")).size == (3, 65_535)


def test_names_that_are_no_utf8_are_prepared_and_shown(tmp_path):
    for name, content in ((b"caf\xe9/a\xe8.jpg", image_bytes(1)), (b"caf\xe9/b\xe8.jpg", b""), (b"tea/c.jpg", image_bytes(2))):
        path = os.fsencode(tmp_path / "images") + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(content)
    command("folder", "--source", tmp_path / "images", "--out", tmp_path / "out", "--max-refused", 50)
    assert ShardIndex.open(tmp_path / "out").class_names == (os.fsdecode(b"caf\xe9"), "tea")
    (line,) = (json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open())
    assert os.fsencode(line["source"]).endswith(b"caf\xe9/b\xe8.jpg")
    assert r"caf\udce9 1" in command("show", tmp_path / "out").stdout


def test_many_names_may_have_one_key():
    """Names in other scripts: with quadratic time this took minutes."""
    keys = unique_keys(["\u732b"] * 100_000)
    assert (keys[0], keys[1], keys[-1]) == ("sample", "sample-2", "sample-100000")
    assert len(set(keys)) == len(keys)


def test_a_read_that_fails_says_which_file():
    with pytest.raises(OSError, match="/proc/self/mem"):
        FileRef("/proc/self/mem", 0, 0).read()


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/1.jpg").write_bytes(image_bytes(1))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-0000.tar").write_bytes(b"precious")
    done = command("folder", "--source", tmp_path / "images", "--out", tmp_path / "out", "--one-class", check=False)
    assert (done.returncode, (tmp_path / "out/train-0000.tar").read_bytes()) == (2, b"precious")
    assert "no preparation says that it made it" in done.stderr
    done = command("folder", "--source", tmp_path / "images", "--out", tmp_path / "images/shards", check=False)
    assert (done.returncode, "among the classes" in done.stderr) == (2, True)
    (tmp_path / "images/a").rename(tmp_path / "images/val")
    done = command("folder", "--source", tmp_path / "images", "--out", tmp_path / "other", check=False)
    assert (done.returncode, "has val, but no train" in done.stderr) == (2, True)


def test_links_to_folders_are_followed_as_torchvision_does_and_not_in_circles(tmp_path):
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for number, path in enumerate((root / "a/1.jpg", root / "b/2.jpg", elsewhere / "deep/3.jpg", tmp_path / "c/4.jpg")):
        path.parent.mkdir(parents=True)
        path.write_bytes(image_bytes(number))
    (root / "a/linked").symlink_to(elsewhere)
    (root / "c").symlink_to(tmp_path / "c")
    theirs = ImageFolder(str(root)).samples
    for link, target in (("a/0", "."), ("b/up", ".."), ("c/round", root), ("a/linked/deep/back", root / "a/linked")):
        (root / link).symlink_to(target)  # ImageFolder goes round in these until the system stops it
    items = folder_source(root).splits["train"].items
    assert [(item.ref.path, item.label) for item in items] == theirs
    assert [item.key for item in items] == ["a_1", "a_linked-deep-3", "b_2", "c_4"]


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A shard of others: a key twice, labels that are no class, a CMYK image, an image with much behind its end."""
    cmyk = encoded(Image.new("CMYK", (8, 8), (1, 2, 3, 4)))
    rows = [("a", b"0", 1), ("a", b"1", 2), ("b", b"2", 3), ("c", b"99999999999", 4), ("d", b"1", 5), ("e", b"0", 6)]
    (tmp_path / "hub").mkdir()
    with tarfile.open(tmp_path / "hub/x-train-0.tar", "w") as tar:
        for key, label, seed in rows:
            add(tar, f"{key}.cls", label)
            add(tar, f"{key}.jpg", {"d": cmyk, "e": image_bytes(6) + bytes(100_000)}.get(key, image_bytes(seed)))
    (tmp_path / "names").write_text("zero\none\n")
    return tmp_path


def test_samples_of_foreign_shards_that_cannot_serve_are_named(foreign):
    asked = ("--source", foreign / "hub", "--out", foreign / "out", "--class-names", foreign / "names", "--max-refused", 80)
    command("wds", *asked)
    index = ShardIndex.open(foreign / "out")
    assert [(index.key(row), int(index.labels[row])) for row in range(index.num_samples)] == [("a", 0), ("d", 1)]
    refused = told(foreign / "out", "quarantine")
    assert refused["a"] == "another sample before it has this key"
    assert refused["b"] == "label 2: there are 2 classes at most"
    assert refused["c"] == "label 99999999999: there are 2 classes at most"
    assert refused["e"] == "truncated JPEG: no end marker"
    assert told(foreign / "out", "notes")["d"] == "CMYK re-encoded as RGB PNG; not here, the shard stays as it is"
    assert "no defects" in command("verify", foreign / "out", "--full").stdout


def test_two_splits_that_would_become_one_are_refused(foreign):
    for name in ("x-val-0.tar", "x-test-0.tar"):
        (foreign / "hub" / name).write_bytes((foreign / "hub/x-train-0.tar").read_bytes())
    with pytest.raises(ValueError, match="has test and val, any of which could become val"):
        find_splits(foreign / "hub")
    (foreign / "hub/_info.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"_info\.json: no splits with their filenames"):
        find_splits(foreign / "hub")


def test_a_damaged_devkit_is_refused_by_name(tmp_path):
    with tarfile.open(tmp_path / "class.tar", "w") as tar:
        add(tar, "n01_1.JPEG", image_bytes(1))
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        add(tar, "n01.tar", (tmp_path / "class.tar").read_bytes())
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        add(tar, "ILSVRC2012_val_00000001.JPEG", image_bytes(2))
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"devkit_t12.tar.gz: not readable"):
        imagenet_source(tmp_path)


@pytest.mark.parametrize(("in_train", "said"), [("1111", "split val (12 for train)"), ("0000", "split train (12 for val)")])
def test_an_archive_without_images_for_a_split_is_refused(in_train, said, tmp_path, capsys):
    write_cub200(tmp_path / "cub.tgz", "w:gz", in_train)
    assert main(["cub200", "--source", str(tmp_path / "cub.tgz"), "--out", str(tmp_path / "out"), "--shards", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'cub.tgz'}: 0 images for the {said}; a split needs at least one" in line
    assert not (tmp_path / "out").exists()


def test_verify_survives_any_manifest_and_sees_unfinished_splits(tmp_path):
    command("digits", "--out", tmp_path / "out", "--limit", "9", "--shards", "3")
    manifest = tmp_path / "out/train/manifest.json"
    good = json.loads(manifest.read_text())
    for key in ("shards", "class_names", "index_sha256", "num_samples", "root"):
        for value in (None, 7, [], [{}]):
            manifest.write_text(json.dumps({**good, key: value}))
            with pytest.raises(ValueError, match=str(tmp_path)):
                ShardIndex.load(manifest.parent)
    for content in (b"[]", b"\xff\xfe{", b"null"):
        manifest.write_bytes(content)
        with pytest.raises(ValueError, match=str(manifest)):
            ShardIndex.load(manifest.parent)
    good["shards"][-1]["samples"] += 1
    manifest.write_text(json.dumps(good))
    done = command("verify", tmp_path / "out", check=False)
    assert (done.returncode, "9 samples of 10 classes, its lists have 10 of 10" in done.stdout) == (1, True)
    manifest.unlink()
    (manifest.parent / ".parts").mkdir()
    done = command("verify", tmp_path / "out", check=False)
    assert (done.returncode, f"{manifest.parent}: its preparation was not finished" in done.stdout) == (1, True)


def test_a_split_without_images_can_be_shown(tmp_path):
    (tmp_path / "out").mkdir()
    facts = {"quarantined": 1, "noted": 0, "plan": {"source": "folder"}}
    write_split(tmp_path / "out", [], np.zeros(0, RECORD), ["a"], extra=facts)
    assert "no images" in command("show", tmp_path / "out").stdout
