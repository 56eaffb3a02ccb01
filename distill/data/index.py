"""The shard index and the manifest of one split: schema, writing, opening, checking.

A split is a folder with `manifest.json`, `index.npy` and its shards (uncompressed tar files in the WebDataset layout). The
index has one fixed-size row per sample, in shard order, and is memory-mapped: 28 bytes a sample, 36 MB at 1.28 million,
shared by all processes of a machine.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.files import file_sha256, json_bytes, write_atomically, written_aside

FORMAT = 2
OLD_FORMAT = 1
"""Without height and width in the index; `shards/renew.py` adds them."""
MANIFEST = "manifest.json"
INDEX = "index.npy"
TAR_BLOCK = 512

RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("shard", "<u4"),
        ("size", "<u4"),
        ("label", "<u4"),
        ("crc32", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)
"""One sample, 28 bytes: `size` bytes of encoded image at `offset` of shard number `shard`, and the image's `height` and
`width` in pixels as stored (an EXIF rotation is not applied)."""
MAX_SIDE = np.iinfo(RECORD["height"]).max
"""Pixels of a side: what the two bytes hold, and the limit of JPEG itself."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard, as the manifest describes it."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_split(
    folder: Path,
    shards: Sequence[ShardInfo],
    records: NDArray[np.void],
    class_names: Sequence[str],
    *,
    root: str = ".",
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes `index.npy`, then `manifest.json` last: a split without a manifest is unfinished.

    `records` has dtype `RECORD`, sorted by shard, as many rows as the shards have samples. `root` is the folder of the shards,
    absolute or relative to `folder`. `extra` goes into the manifest beside our own keys (source, options, tool versions).
    """
    held = sum(shard.samples for shard in shards)
    if len(records) != held:
        raise ValueError(f"{folder}: {len(records)} index rows for shards that hold {held} samples")
    with written_aside(folder / INDEX) as aside, aside.open("wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(records), version=(1, 0))
    manifest = {
        "format": FORMAT,
        "num_samples": len(records),
        "num_classes": len(class_names),
        "root": root,
        "index_sha256": file_sha256(folder / INDEX),
        **(extra or {}),
        "shards": [asdict(shard) for shard in shards],
        "class_names": list(class_names),
    }
    write_atomically(folder / MANIFEST, json_bytes(manifest))


class ShardIndex:
    """The samples of one split: where each lies, its label, its checksum. Made by `ShardIndex.open`."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], records: NDArray[np.void]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.records = records
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.shards = tuple(ShardInfo(**shard) for shard in manifest["shards"])
        self.digest: str = manifest["index_sha256"]
        """Identifies the split: sha256 of the index, which holds every sample's checksum."""
        root = folder / manifest["root"]
        self._paths = tuple(root / shard.name for shard in self.shards)

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> ShardIndex:
        """The index of the split in `folder`, after every shard's size was compared with the manifest (stat only).

        Raises ValueError, naming folder or shard and the remedy, where the folder is no prepared split, where the index is
        not the one that the manifest describes, and where a shard is missing or has another size.
        """
        index = cls.load(folder)
        index._check_sizes()
        return index

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ShardIndex:
        """The index without a look at the shards, for checks that report every defect. Raises ValueError as `open` does."""
        path = Path(folder)
        manifest = read_manifest(path)
        _check_format(path, manifest["format"])
        try:
            index = cls(path, manifest, _map_records(path, manifest))
            held = sum(shard.samples for shard in index.shards), index.num_classes
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / MANIFEST}: damaged ({type(error).__name__}: {error}); prepare the split again"
            ) from error
        said = manifest["num_samples"], manifest.get("num_classes")
        if held != said:
            raise ValueError(
                f"{path / MANIFEST}: damaged: {said[0]} samples of {said[1]} classes, its lists have {held[0]} of {held[1]}; "
                "prepare the split again"
            )
        return index

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return len(self.records)

    @property
    def shard_samples(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """Classes of the split's class map; a class may have no sample here."""
        return len(self.class_names)

    @property
    def labels(self) -> NDArray[np.int64]:
        """int64 [num_samples], a copy."""
        return self.records["label"].astype(np.int64)

    def sizes(self, samples: NDArray[np.int64] | int) -> NDArray[np.int64]:
        """int64 [B, 2], the (height, width) of each sample's image; [2] for one sample."""
        rows = self.records[samples]
        return np.stack([rows["height"], rows["width"]], axis=-1).astype(np.int64)

    def shard_path(self, shard: int) -> Path:
        """The file of shard number `shard`."""
        return self._paths[shard]

    def key(self, sample: int) -> str:
        """The sample's key, read from its tar header (so it costs a read: for reports)."""
        record = self.records[sample]
        header = self._header(int(record["shard"]), int(record["offset"]))
        return member_key(header.name)

    def spot_check(self) -> None:
        """Compares a sample of every shard with its checksum: finds shards replaced by others of the same size.

        Costs one small read per shard. One damaged image is no reason to stop: where the first sample differs, the middle
        and the last one have to differ too. Raises ValueError naming the shard.
        """
        first = np.cumsum([0, *(shard.samples for shard in self.shards)])
        for number, shard in enumerate(self.shards):
            rows = [int(first[number]) + offset for offset in (0, shard.samples // 2, shard.samples - 1)]
            if shard.samples and not any(map(self._is_as_indexed, rows)):
                raise ValueError(
                    f"{self._paths[number]}: its first, middle and last image do not have the checksums of the index: the "
                    "shard was replaced or damaged; restore it or prepare the split again"
                )

    def _is_as_indexed(self, sample: int) -> bool:
        offset, shard, size, _, crc32, *_ = self.records[sample].item()
        with self._paths[shard].open("rb") as file:
            file.seek(offset)
            return size > 0 and zlib.crc32(file.read(size)) == crc32

    def _header(self, shard: int, offset: int) -> tarfile.TarInfo:
        with self._paths[shard].open("rb") as file:
            file.seek(offset - TAR_BLOCK)
            return tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "surrogateescape")

    def _check_sizes(self) -> None:
        for path, shard in zip(self._paths, self.shards, strict=True):
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ValueError(
                    f"{path}: shard is missing ({error.strerror}); copy it again, or remove {self.folder} and prepare it again"
                ) from error
            if size != shard.bytes:
                raise ValueError(
                    f"{path}: shard has {size} bytes, the manifest says {shard.bytes}; "
                    f"copy it again, or remove {self.folder} and prepare it again"
                )


def member_key(name: str) -> str:
    """A WebDataset key: the member's name up to the first dot after its last slash."""
    head, slash, tail = name.rpartition("/")
    return head + slash + tail.split(".", 1)[0]


def read_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest of a split of any format, by its keys; `format` is one of them. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; make it with `python shards/prepare.py SOURCE ... --out DIR`")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = (
            f"its splits are {', '.join(splits)}: name one of them, as {folder / splits[0]}"
            if splits
            else "prepare it, or let an unfinished preparation finish, with `python shards/prepare.py`"
        )
        raise ValueError(f"{folder}: no {MANIFEST} in it, so this is no finished split; {hint}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{folder / MANIFEST}: not readable as JSON ({error}); prepare the split again") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{folder / MANIFEST}: damaged (no format in it); prepare the split again")
    return manifest


def _check_format(folder: Path, found: object) -> None:
    if found == OLD_FORMAT:
        raise ValueError(
            f"{folder}: prepared by an earlier version, its index has no image sizes; run "
            f"`python shards/prepare.py renew {folder}`, which writes them into the index and keeps the shards"
        )
    if found != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: format {found}, this version reads {FORMAT}; prepare the split again")


def _map_records(folder: Path, manifest: Mapping[str, Any]) -> NDArray[np.void]:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{path}: the index is missing; prepare the split again")
    if (found := file_sha256(path)) != manifest["index_sha256"]:
        raise ValueError(
            f"{path}: sha256 {found[:12]}..., the manifest says {manifest['index_sha256'][:12]}...; prepare the split again"
        )
    if manifest["num_samples"] == 0:  # an empty array cannot be mapped
        return np.zeros(0, RECORD)
    records = np.load(path, mmap_mode="r")
    if records.dtype != RECORD or len(records) != manifest["num_samples"]:
        raise ValueError(
            f"{path}: {len(records)} rows of {records.dtype}, the manifest says {manifest['num_samples']} samples; "
            "prepare the split again"
        )
    return records
