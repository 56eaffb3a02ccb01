"""Checks prepared splits against their shards and names every defect; the shards are only read."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from distill.data.index import ShardIndex, ShardInfo, member_key
from distill.data.manifest import MANIFEST
from distill.data.order import permutation
from distill.data.remote.urls import is_url
from distill.data.store import ShardLost
from distill.seeds import derive_seed
from shards.existing import label_text
from shards.images import Unclean, clean_image
from shards.jobs import PARTS
from shards.tarwalk import BrokenTar, Member, walk_tar


def find_split_folders(folder: Path) -> list[Path]:
    """The prepared splits in `folder`: itself, or the folders right below it. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = [folder] if (folder / MANIFEST).is_file() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise ValueError(f"{folder}: no {MANIFEST} in it or right below it, so no finished split")
    return found


def unfinished_splits(folder: Path) -> list[Path]:
    """Splits right below `folder` whose preparation was begun and not finished."""
    begun = sorted(path.parent for path in folder.glob(f"*/{PARTS}"))
    return [split for split in begun if not (split / MANIFEST).is_file()]


def verify_split(folder: Path, decodes: int | None) -> Iterator[str]:
    """One line per defect of the split: sizes, sha256, index against tar headers and labels, checksums, decoding.

    `decodes` images, drawn at random over the split, are decoded in full; None decodes all.
    """
    try:
        index = ShardIndex.load(folder)
    except ValueError as error:
        yield str(error)
        return
    count = index.num_samples if decodes is None else min(decodes, index.num_samples)
    chosen = np.zeros(index.num_samples, bool)
    chosen[permutation(derive_seed(0, "verify", index.num_samples), index.num_samples)[:count]] = True
    first = 0
    for number, shard in enumerate(index.shards):
        rows = slice(first, first + shard.samples)
        first = rows.stop
        path = index.shard_path(number)
        try:
            os.close(index.store.open(number))  # a remote shard is fetched; of a file that is missing more is said below
        except ShardLost as error:
            if is_url(index.store.where(number)):
                yield str(error)
                continue
        for defect in _verify_shard(path, number, shard, index.records[rows], chosen[rows], index.class_names):
            yield f"{path}: {defect}"


def _verify_shard(
    path: Path, number: int, shard: ShardInfo, records: NDArray[np.void], chosen: NDArray[np.bool_], class_names: Sequence[str]
) -> Iterator[str]:
    if not path.is_file():
        yield "missing"
        return
    with path.open("rb") as file:
        yield from _verify_file(file, shard)
        try:
            members = {member.offset: member for member in walk_tar(file, marked=False)}
        except BrokenTar as error:
            yield str(error)
            return
        labels: dict[str, Member] = {}
        for member in members.values():
            if member.name.endswith(".cls"):
                labels.setdefault(member_key(member.name), member)  # of a key that comes twice the first is indexed
        for record, decode in zip(records, chosen, strict=True):
            yield from _verify_sample(file, record, number, members, labels, class_names, bool(decode))


def _verify_file(file: BinaryIO, shard: ShardInfo) -> Iterator[str]:
    sha = hashlib.sha256()
    while block := file.read(1 << 20):
        sha.update(block)
    if file.tell() != shard.bytes:
        yield f"{file.tell()} bytes, the manifest says {shard.bytes}"
    elif sha.hexdigest() != shard.sha256:
        yield f"sha256 {sha.hexdigest()[:12]}..., the manifest says {shard.sha256[:12]}..."


def _verify_sample(
    file: BinaryIO,
    record: np.void,
    number: int,
    members: dict[int, Member],
    labels: dict[str, Member],
    class_names: Sequence[str],
    decode: bool,
) -> Iterator[str]:
    offset, size, label = (int(record[name]) for name in ("offset", "size", "label"))
    member = members.get(offset)
    if int(record["shard"]) != number or member is None or member.size != size:
        yield f"no member of {size} bytes at offset {offset}, where the index has one"
        return
    file.seek(offset)
    data = file.read(size)
    if zlib.crc32(data) != int(record["crc32"]):
        yield f"{member.name} at offset {offset}: checksum {zlib.crc32(data):08x}, the index says {int(record['crc32']):08x}"
    if label >= len(class_names):
        yield f"{member.name}: label {label}, there are {len(class_names)} classes"
    if (text := labels.get(member_key(member.name))) is not None:
        file.seek(text.offset)
        content = file.read(text.size)
        if not _says(label_text(content), label, class_names):
            yield f"{member.name}: {text.name} says {content[:20]!r}, the index {label}"
    if decode:
        try:
            found = clean_image(data).size
        except Unclean as error:
            yield f"{member.name} at offset {offset}: does not decode: {error}"
            return
        if found != (said := (int(record["height"]), int(record["width"]))):
            yield f"{member.name} at offset {offset}: {found[0]} x {found[1]} pixels, the index says {said[0]} x {said[1]}"


def _says(text: str, label: int, class_names: Sequence[str]) -> bool:
    """Whether a label's file means this class: by its number, or by its name (an old number, where they were renumbered)."""
    if label < len(class_names) and text == class_names[label]:
        return True
    return text.isascii() and text.isdigit() and len(text) < 20 and int(text) == label
