"""Every source, from a small archive of the official layout made here."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import webdataset
from PIL import Image

from distill.data.index import ShardIndex
from tests.shards.preparing import command, file_hashes, image_bytes


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def images_by_class(folder: Path) -> dict[str, set[bytes]]:
    index = ShardIndex.open(folder)
    found: dict[str, set[bytes]] = {name: set() for name in index.class_names}
    for record in index.records:
        data = index.shard_path(int(record["shard"])).read_bytes()[record["offset"] : record["offset"] + record["size"]]
        found[index.class_names[record["label"]]].add(data)
    return found


WNIDS = ("n03", "n01", "n02")  # the order of the ILSVRC ids 1, 2, 3; class numbers follow the sorted names


@pytest.fixture
def imagenet(tmp_path) -> Path:
    """The three official archives with 3 classes of 4 images, 5 validation images, and an inner node in the devkit."""
    root = tmp_path / "archives"
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for number, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for image in range(4):
                    add(tar, f"{wnid}_{image}.JPEG", image_bytes(number * 10 + image))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 5, 2, 4):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", image_bytes(100 + number))
    synsets = np.zeros(4, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    for row, (number, wnid, children) in enumerate([(1, "n03", 0), (2, "n01", 0), (3, "n02", 0), (4, "n00", 3)]):
        synsets[row] = (number, wnid, children)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n2\n1\n3\n1\n")
    return root


def test_imagenet_classes_are_wnids_in_sorted_order_and_validation_follows_the_devkit(imagenet, tmp_path):
    command("imagenet", "--source", imagenet, "--out", tmp_path / "out", "--shards", 2)
    train = images_by_class(tmp_path / "out/train")
    assert list(train) == ["n01", "n02", "n03"]
    for number, wnid in enumerate(WNIDS):
        assert train[wnid] == {image_bytes(number * 10 + image) for image in range(4)}
    val = images_by_class(tmp_path / "out/val")
    assert val == {
        "n01": {image_bytes(101), image_bytes(102)},
        "n02": {image_bytes(104)},
        "n03": {image_bytes(103), image_bytes(105)},
    }
    index = ShardIndex.open(tmp_path / "out/val")
    assert sorted(index.key(n) for n in range(5)) == [f"ILSVRC2012_val_{n:08d}" for n in range(1, 6)]


def test_a_truncated_or_missing_imagenet_archive_is_refused_by_name(imagenet, tmp_path):
    path = imagenet / "ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    done = command("imagenet", "--source", imagenet, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "ILSVRC2012_img_train.tar: member" in done.stderr
    assert "truncated; fetch the archive again" in done.stderr
    path.unlink()
    done = command("imagenet", "--source", imagenet, "--out", tmp_path / "out", check=False)
    assert (done.returncode, "ILSVRC2012_img_train.tar: not there" in done.stderr) == (2, True)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_pixels_come_back_bit_for_bit(classes, tmp_path):
    rng = np.random.default_rng(0)
    names = [f"class{number:03d}" for number in range(classes)]
    parts = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"] if classes == 10 else ["train", "test"]
    label_key, name_key, meta = (
        (b"labels", b"label_names", "batches.meta") if classes == 10 else (b"fine_labels", b"fine_label_names", "meta")
    )
    content = {part: rng.integers(0, 256, (6, 3072), dtype=np.uint8) for part in parts}
    labels = {part: rng.integers(0, classes, 6).tolist() for part in parts}
    archive = tmp_path / f"cifar-{classes}-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for part in parts:
            batch = {b"data": content[part], label_key: labels[part], b"filenames": [b"x.png"] * 6}
            add(tar, f"cifar/{part}", pickle.dumps(batch, protocol=2))
        add(tar, f"cifar/{meta}", pickle.dumps({name_key: [name.encode() for name in names]}, protocol=2))
    command(f"cifar{classes}", "--source", archive, "--out", tmp_path / "out", "--shards", 2)
    for split, members in (("train", parts[:-1]), ("val", parts[-1:])):
        found = images_by_class(tmp_path / "out" / split)
        assert list(found) == names
        pixels = {(name, np.asarray(Image.open(io.BytesIO(data))).tobytes()) for name, datas in found.items() for data in datas}
        expected = {
            (names[label], row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes())
            for part in members
            for row, label in zip(content[part], labels[part], strict=True)
        }
        assert pixels == expected
        assert all(Image.open(io.BytesIO(data)).format == "PNG" for datas in found.values() for data in datas)


class RunsCode:
    """Unpickled naively, this creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add(tar, "cifar/meta", pickle.dumps({b"data": RunsCode(str(tmp_path / "created"))}))
    done = command("cifar100", "--source", archive, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "has no place in a data set" in done.stderr
    assert not (tmp_path / "created").exists()


def write_cub200(archive: Path, mode: str, in_train: str) -> None:
    """3 classes of 4 images; `in_train` has one digit for each image of a class."""
    paths = [f"{label + 1:03d}.Bird_{label}/Bird_{label}_{image:04d}.jpg" for label in range(3) for image in range(4)]
    with tarfile.open(archive, mode) as tar:
        root = "CUB_200_2011"
        add(tar, f"{root}/images.txt", "".join(f"{n} {path}\n" for n, path in enumerate(paths, 1)).encode())
        add(tar, f"{root}/classes.txt", "".join(f"{n} {n:03d}.Bird_{n - 1}\n" for n in range(1, 4)).encode())
        add(tar, f"{root}/image_class_labels.txt", "".join(f"{n} {(n - 1) // 4 + 1}\n" for n in range(1, 13)).encode())
        add(tar, f"{root}/train_test_split.txt", "".join(f"{n + 1} {in_train[n % 4]}\n" for n in range(12)).encode())
        for number, path in enumerate(paths, 1):
            add(tar, f"{root}/images/{path}", image_bytes(number))


@pytest.mark.parametrize(("suffix", "mode"), [(".tgz", "w:gz"), (".tar", "w"), (".tar", "w:gz"), (".tgz", "w")])
def test_cub200_keeps_its_own_split_whatever_its_archive_is_named(suffix, mode, tmp_path):
    archive = tmp_path / f"CUB_200_2011{suffix}"
    write_cub200(archive, mode, "1110")
    command("cub200", "--source", archive, "--out", tmp_path / "out", "--shards", 2)
    train, val = (images_by_class(tmp_path / "out" / split) for split in ("train", "val"))
    assert list(train) == ["001.Bird_0", "002.Bird_1", "003.Bird_2"]
    for label, name in enumerate(train):
        assert train[name] == {image_bytes(label * 4 + image) for image in (1, 2, 3)}
        assert val[name] == {image_bytes(label * 4 + 4)}


@pytest.fixture
def hub_shards(tmp_path) -> Path:
    """Shards as timm's on the hub: webdataset's own writer with its PAX headers, cls, jpg and json, and some faults."""
    root = tmp_path / "hub"
    root.mkdir()
    for split, count in (("train", 3), ("validation", 2)):
        for shard in range(count):
            with webdataset.TarWriter(str(root / f"set-{split}-{shard:04d}.tar")) as writer:
                for number in range(5):
                    seed = shard * 10 + number
                    label = seed % 4
                    sample = {
                        "__key__": f"n01440764_{split}_{seed}",
                        "cls": str(label).encode(),
                        "jpg": image_bytes(seed),
                        "json": json.dumps({"label_12k": (label + 1) if seed != 3 else -1}).encode(),
                    }
                    if split == "train" and seed == 11:
                        sample["jpg"] = sample["jpg"][:300]
                    if split == "train" and seed == 21:
                        sample["cls"] = b"dog"
                    writer.write(sample)
    return root


def test_existing_shards_are_indexed_and_not_changed(hub_shards, tmp_path):
    before = file_hashes(hub_shards)
    done = command("wds", "--source", hub_shards, "--out", tmp_path / "out", "--workers", 2, "--max-refused", 14)
    assert file_hashes(hub_shards) == before
    assert "train: 13 images, 3 shards" in done.stdout
    train, val = ShardIndex.open(tmp_path / "out/train"), ShardIndex.open(tmp_path / "out/val")
    assert (train.num_samples, val.num_samples, val.num_classes) == (13, 10, 4)
    theirs = {}
    for url in sorted(hub_shards.glob("*train*")):
        for sample in webdataset.WebDataset(str(url), shardshuffle=False):
            theirs[sample["__key__"]] = (sample["jpg"], sample["cls"])
    for number in range(13):
        record = train.records[number]
        data = train.shard_path(int(record["shard"])).read_bytes()[record["offset"] : record["offset"] + record["size"]]
        assert theirs[train.key(number)] == (data, str(record["label"]).encode())
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in (tmp_path / "out/train/quarantine.jsonl").open()}
    assert set(reasons) == {"n01440764_train_11", "n01440764_train_21"}
    assert "'dog' is no class number" in reasons["n01440764_train_21"]
    assert "no defects" in command("verify", tmp_path / "out", "--full").stdout


def test_labels_of_existing_shards_can_come_from_their_json(hub_shards, tmp_path):
    (tmp_path / "names").write_text("background\na\nb\nc\nd\n")
    command(
        "wds",
        "--source",
        hub_shards,
        "--out",
        tmp_path / "out",
        "--json-label",
        "label_12k",
        "--class-names",
        tmp_path / "names",
        "--max-refused",
        "15",
    )
    train = ShardIndex.open(tmp_path / "out/train")
    assert train.class_names == ("background", "a", "b", "c", "d")
    for number in range(train.num_samples):
        assert train.labels[number] == int(train.key(number).rsplit("_", 1)[1]) % 4 + 1
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out/train/quarantine.jsonl").open()]
    assert any("-1 is no class number" in reason for reason in reasons)


def test_a_truncated_existing_shard_is_an_error_with_its_name(hub_shards, tmp_path):
    path = hub_shards / "set-train-0001.tar"
    path.write_bytes(path.read_bytes()[:-12000])
    done = command("wds", "--source", hub_shards, "--out", tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "set-train-0001.tar" in done.stderr
    assert "truncated" in done.stderr
    assert not (tmp_path / "out/train/manifest.json").exists()
