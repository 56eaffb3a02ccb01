"""Splits of an earlier version: the sizes of the images go into their index, the shards stay as they are."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from distill.data.index import MAX_SIDE, RECORD, ShardIndex, ShardInfo, write_split
from distill.data.manifest import INDEX, MANIFEST, OLD_FORMAT, read_manifest
from distill.files import file_sha256

WRITTEN_ANEW = ("format", "num_samples", "num_classes", "root", "index_sha256", "shards", "class_names")
"""Keys of the manifest that `write_split` writes itself."""


def renew_split(folder: Path, progress: bool = True) -> bool:
    """Renews index and manifest of a split of the earlier format; False, and nothing done, where it has the present one.

    Reads every image and compares it with its checksum. Raises ValueError, naming the shard, where they differ, and OSError.
    """
    manifest = read_manifest(folder)
    if manifest["format"] != OLD_FORMAT:
        ShardIndex.load(folder)  # raises for a format that nobody knows
        return False
    try:
        shards = [ShardInfo(**shard) for shard in manifest["shards"]]
        held, root = sum(shard.samples for shard in shards), folder / manifest["root"]
        class_names, digest = list(manifest["class_names"]), str(manifest["index_sha256"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged ({type(error).__name__}: {error}); prepare the split again") from error
    records = _widened(folder / INDEX, digest, held)
    for number, shard in enumerate(tqdm(shards, desc=folder.name, unit="shard", disable=not progress)):
        path = root / shard.name
        rows = np.flatnonzero(records["shard"] == number)
        with path.open("rb") as file:
            sizes = [_size(file, record, path) for record in records[rows]]
        records["height"][rows], records["width"][rows] = np.array(sizes, np.int64).reshape(-1, 2).T
    extra = {key: value for key, value in manifest.items() if key not in WRITTEN_ANEW}
    write_split(folder, shards, records, class_names, root=manifest["root"], extra=extra)
    return True


def _widened(path: Path, digest: str, samples: int) -> NDArray[np.void]:
    """The rows of the earlier index with places for height and width; ValueError where the file is not the manifest's."""
    try:
        old = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: not readable ({error}); prepare the split again") from error
    # killed between both files, it left a new index under the old manifest
    if old.dtype != RECORD and file_sha256(path) != digest:
        raise ValueError(f"{path}: its sha256 is not the manifest's; prepare the split again")
    if len(old) != samples:
        raise ValueError(f"{path}: {len(old)} rows, the manifest's shards have {samples} samples; prepare the split again")
    records = np.zeros(len(old), RECORD)
    for name in ("offset", "shard", "size", "label", "crc32"):
        records[name] = old[name]
    return records


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
