"""Splits of an earlier version: the sizes of the images go into their index, the shards stay as they are."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from distill.data.index import INDEX, MANIFEST, MAX_SIDE, OLD_FORMAT, RECORD, ShardInfo, write_split
from distill.files import file_sha256

WRITTEN_ANEW = ("format", "num_samples", "num_classes", "root", "index_sha256", "shards", "class_names")
"""Keys of the manifest that `write_split` writes itself."""


def renew_split(folder: Path, progress: bool = True) -> bool:
    """Renews index and manifest of a split of the earlier format; False, and nothing done, where it has the present one.

    Reads every image and compares it with its checksum. Raises ValueError, naming the shard, where they differ, and OSError.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != OLD_FORMAT:
        return False
    old = np.load(folder / INDEX)
    # killed between both files, it left a new index under the old manifest
    if old.dtype != RECORD and file_sha256(folder / INDEX) != manifest["index_sha256"]:
        raise ValueError(f"{folder / INDEX}: its sha256 is not the manifest's; prepare the split again")
    records = np.zeros(len(old), RECORD)
    for name in ("offset", "shard", "size", "label", "crc32"):
        records[name] = old[name]
    shards = [ShardInfo(**shard) for shard in manifest["shards"]]
    for number, shard in enumerate(tqdm(shards, desc=folder.name, unit="shard", disable=not progress)):
        path = folder / manifest["root"] / shard.name
        rows = np.flatnonzero(records["shard"] == number)
        with path.open("rb") as file:
            sizes = [_size(file, record, path) for record in records[rows]]
        records["height"][rows], records["width"][rows] = np.array(sizes, np.int64).reshape(-1, 2).T
    extra = {key: value for key, value in manifest.items() if key not in WRITTEN_ANEW}
    write_split(folder, shards, records, manifest["class_names"], root=manifest["root"], extra=extra)
    return True


def _size(file: BinaryIO, record: np.void, path: Path) -> tuple[int, int]:
    """(height, width) by the header: preparation has decoded the image once."""
    file.seek(int(record["offset"]))
    data = file.read(int(record["size"]))
    if zlib.crc32(data) != int(record["crc32"]):
        raise ValueError(f"{path}: the image at offset {record['offset']} is damaged; restore the shard, or prepare it again")
    image = Image.open(io.BytesIO(data))
    if max(image.size) > MAX_SIDE:
        raise ValueError(
            f"{path}: the image at offset {record['offset']} has {image.height} x {image.width} pixels, a side may have "
            f"{MAX_SIDE}; prepare the split again, which leaves it out"
        )
    return image.height, image.width
