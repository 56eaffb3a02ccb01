"""Sources that are official archives: ImageNet, CIFAR, CUB-200. Read where they lie, never unpacked to disk."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zlib
from gzip import BadGzipFile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shards.items import BytesRef, Item, PixelsRef, RangeRef, Ref, Source, Split, clean_key
from shards.splits import COMPRESSED
from shards.tarwalk import BrokenTar, Member, walk_tar

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
UNREADABLE = (tarfile.TarError, EOFError, zlib.error, BadGzipFile)
"""What a damaged or truncated archive raises, by where the damage is."""


def imagenet_source(folder: Path) -> Source:
    """ImageNet-1k from the official archives in `folder`, named as they are distributed.

    `ILSVRC2012_img_train.tar` is read as a tar of tars; validation labels come from the devkit. A class's number is the
    place of its WordNet id in sorted order, not the ILSVRC id. Raises ValueError where an archive is missing or damaged.
    """
    _require(folder, TRAIN_TAR)
    train, names = _imagenet_train(folder / TRAIN_TAR)
    splits = {"train": Split(names, train)}
    if (folder / VAL_TAR).is_file():
        _require(folder, DEVKIT)
        splits["val"] = Split(names, _imagenet_val(folder / VAL_TAR, folder / DEVKIT, names))
    return Source("imagenet", splits, {"archives": TRAIN_TAR if len(splits) == 1 else f"{TRAIN_TAR} {VAL_TAR}"})


def _require(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: not there; --source takes the folder with the official archives, as distributed")


def _imagenet_train(archive: Path) -> tuple[list[Item], tuple[str, ...]]:
    with archive.open("rb") as file:
        listed = os.fstat(file.fileno()).st_mtime_ns
        try:
            synsets = sorted(walk_tar(file))
            names = tuple(PurePosixPath(synset.name).stem for synset in synsets)
            items = [
                _range_item(archive, listed, member, label)
                for label, synset in enumerate(synsets)
                for member in sorted(walk_tar(file, synset.offset, synset.offset + synset.size))
            ]
        except BrokenTar as error:
            raise ValueError(f"{archive}: {error}; fetch the archive again") from error
    if not items:
        raise ValueError(f"{archive}: no images in it; a tar of one tar per class is expected")
    return items, names


def _imagenet_val(archive: Path, devkit: Path, names: tuple[str, ...]) -> list[Item]:
    wnids, truth = _read_devkit(devkit)
    with archive.open("rb") as file:
        listed = os.fstat(file.fileno()).st_mtime_ns
        try:
            members = sorted(walk_tar(file))
        except BrokenTar as error:
            raise ValueError(f"{archive}: {error}; fetch the archive again") from error
    if len(members) != len(truth):
        raise ValueError(f"{archive}: {len(members)} images, the devkit's ground truth has {len(truth)} lines")
    place = {name: label for label, name in enumerate(names)}
    if strange := sorted({number for number in truth if number not in wnids}):
        raise ValueError(f"{devkit}: the ground truth has class {strange[0]}, which meta.mat has not; fetch the archive again")
    unknown = sorted({wnids[number] for number in truth} - set(place))
    if unknown:
        raise ValueError(f"{archive}: {len(unknown)} classes that the training archive lacks: {', '.join(unknown[:5])}")
    return [_range_item(archive, listed, member, place[wnids[number]]) for member, number in zip(members, truth, strict=True)]


def _read_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    """The WordNet id of each ILSVRC id, leaves only, and the ILSVRC ids of the validation images in order of their names."""
    try:
        return _parse_devkit(devkit)
    except UNREADABLE as error:
        raise ValueError(f"{devkit}: not readable ({error}); fetch the archive again") from error


def _parse_devkit(devkit: Path) -> tuple[dict[int, str], list[int]]:
    from scipy.io import loadmat

    with tarfile.open(devkit) as tar:
        contents = {PurePosixPath(member.name).name: member for member in tar.getmembers()}
        try:
            meta_file, truth_file = (contents[name] for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
        except KeyError as error:
            raise ValueError(f"{devkit}: no {error} in it; the devkit of tasks 1 and 2 is expected") from error
        meta = loadmat(io.BytesIO(_extracted(tar, meta_file)), squeeze_me=True)["synsets"]
        truth = [int(line) for line in _extracted(tar, truth_file).split()]
    leaves = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in meta if int(synset["num_children"]) == 0}
    return leaves, truth


def _range_item(archive: Path, mtime_ns: int, member: Member, label: int) -> Item:
    key = clean_key(PurePosixPath(member.name).stem)
    return Item(key, label, RangeRef(str(archive), member.offset, member.size, member.name, mtime_ns))


def cifar_source(archive: Path, classes: int) -> Source:
    """CIFAR-10 or -100 from its official python archive; pixels become PNG, so nothing is lost. Official class order."""
    if not archive.is_file():
        raise ValueError(f"{archive}: no such file; --source takes the official python archive of CIFAR-{classes} (.tar.gz)")
    meta, label_key = ("batches.meta", "labels") if classes == 10 else ("meta", "fine_labels")
    name_key = "label_names" if classes == 10 else "fine_label_names"
    batches = {"train": [f"data_batch_{n}" for n in range(1, 6)], "val": ["test_batch"]}
    if classes == 100:
        batches = {"train": ["train"], "val": ["test"]}
    contents = _unpickled(archive, [meta, *batches["train"], *batches["val"]])
    names = tuple(_text(name) for name in contents[meta][name_key])
    splits = {
        split: Split(names, [item for part in parts for item in _cifar_items(contents[part], part, label_key)])
        for split, parts in batches.items()
    }
    return Source(f"cifar{classes}", splits, {"archive": archive.name})


def _cifar_items(batch: dict[str, Any], part: str, label_key: str) -> list[Item]:
    images = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    key = part.replace("_", "-")
    return [
        Item(f"{key}-{row:05d}", int(label), PixelsRef(image.tobytes(), 32, 32, "PNG", f"{part}, row {row}"))
        for row, (image, label) in enumerate(zip(images, batch[label_key], strict=True))
    ]


def _unpickled(archive: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in names:
                    content = _PlainUnpickler(io.BytesIO(_extracted(tar, member)), encoding="bytes").load()
                    found[name] = {_text(key): value for key, value in content.items()}
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        raise ValueError(f"{archive}: not readable ({error}); fetch the archive again") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{archive}: {', '.join(missing)} not in it; is it the python version of this data set?")
    return found


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays, lists and texts, nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        if (module.rpartition(".")[2], name) not in allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data set")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def cub200_source(archive: Path) -> Source:
    """CUB-200-2011 from its official archive, with its own split; `test` becomes `val`.

    A compressed archive, by its first bytes, is held in memory (1.1 GB); an uncompressed one (`gunzip` it first) is read where
    it lies.
    """
    if not archive.is_file():
        raise ValueError(f"{archive}: no such file; --source takes the official archive of CUB-200-2011 (.tgz)")
    tables, images = _read_cub(archive)
    names = tuple(tables["classes.txt"][number] for number in sorted(tables["classes.txt"], key=int))
    items: dict[str, list[Item]] = {"train": [], "val": []}
    for number, path in tables["images.txt"].items():
        if path not in images:
            raise ValueError(f"{archive}: {path} is in images.txt but not in the archive; fetch it again")
        label = int(tables["image_class_labels.txt"][number]) - 1
        split = "train" if tables["train_test_split.txt"][number] == "1" else "val"
        items[split].append(Item(clean_key(PurePosixPath(path).stem), label, images[path]))
    return Source("cub200", {split: Split(names, rows) for split, rows in items.items()}, {"archive": archive.name})


def _read_cub(archive: Path) -> tuple[dict[str, dict[str, str]], dict[str, Ref]]:
    wanted = ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")
    tables: dict[str, dict[str, str]] = {}
    images: dict[str, Ref] = {}
    listed = archive.stat().st_mtime_ns
    try:
        with tarfile.open(archive) as tar:
            plain = not _begins_with(archive, tuple(COMPRESSED))
            for member in tar:
                path = PurePosixPath(member.name)
                if path.name in wanted:
                    tables[path.name] = _table(_extracted(tar, member).decode())
                elif member.isfile() and "images" in path.parts:
                    name = path.relative_to(*path.parts[: path.parts.index("images") + 1]).as_posix()
                    images[name] = (
                        RangeRef(str(archive), member.offset_data, member.size, member.name, listed)
                        if plain
                        else BytesRef(_extracted(tar, member), member.name)
                    )
    except UNREADABLE as error:
        raise ValueError(f"{archive}: not readable ({error}); fetch the archive again") from error
    if missing := [name for name in wanted if name not in tables]:
        raise ValueError(f"{archive}: {', '.join(missing)} not in it; is it CUB-200-2011?")
    return tables, images


def _begins_with(path: Path, magic: tuple[bytes, ...]) -> bool:
    with path.open("rb") as file:
        return file.read(max(map(len, magic))).startswith(magic)


def _table(text: str) -> dict[str, str]:
    """Lines `KEY VALUE` in their order."""
    return dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())


def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name}: a link or folder where a file is expected; fetch the archive again")
    return file.read()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
