"""The shard index and the manifest of one split: schema, writing, opening, checking.

A split is a folder with `manifest.json`, `index.npy` and its shards (uncompressed tar files in the WebDataset layout). The
index has one fixed-size row per sample, in shard order, and is memory-mapped: 28 bytes a sample, 36 MB at 1.28 million,
shared by all processes of a machine.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.manifest import FORMAT, INDEX, MANIFEST, REMOTE_FORMAT, check_format, check_shard, read_manifest
from distill.data.remote.cache import cache_folder
from distill.data.remote.cached_store import CachedStore
from distill.data.remote.split import fetched_split, store_of
from distill.data.remote.urls import is_url
from distill.data.store import LocalStore, ShardInfo, ShardLost, ShardStore
from distill.files import file_sha256, json_bytes, write_atomically, written_aside

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
    absolute or relative to `folder`, or a URL. `extra` goes into the manifest beside our own keys (source, options, versions).
    """
    held = sum(shard.samples for shard in shards)
    if len(records) != held:
        raise ValueError(f"{folder}: {len(records)} index rows for shards that hold {held} samples")
    with written_aside(folder / INDEX) as aside, aside.open("wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(records), version=(1, 0))
    manifest = {
        "format": REMOTE_FORMAT if is_url(root) else FORMAT,
        "num_samples": len(records),
        "num_classes": len(class_names),
        "root": root,
        "index_sha256": file_sha256(folder / INDEX),
        **(extra or {}),
        "shards": [{key: value for key, value in asdict(shard).items() if value != ""} for shard in shards],
        "class_names": list(class_names),
    }
    write_atomically(folder / MANIFEST, json_bytes(manifest))


class ShardIndex:
    """The samples of one split: where each lies, its label, its checksum. Made by `ShardIndex.open`."""

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], records: NDArray[np.void], place: str = "", cache: Path | None = None
    ) -> None:
        """folder: where the index lies. place: the split's URL, where it has one. cache: the folder for remote shards."""
        self.folder = folder
        """The folder of the index; of a remote split, one of the cache."""
        self.place = place or str(folder)
        """The split's folder or URL, for people."""
        self.manifest = manifest
        self.records = records
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.shards = tuple(ShardInfo(**shard) for shard in manifest["shards"])
        for shard in self.shards:
            check_shard(self.place, shard)
        self.digest: str = manifest["index_sha256"]
        """Identifies the split: sha256 of the index, which holds every sample's checksum."""
        self.store: ShardStore = self._made_store(cache or cache_folder())
        """The shards' files."""

    @classmethod
    def open(cls, place: str | os.PathLike[str], cache: Path | None = None) -> ShardIndex:
        """The index of the split in a folder or at a URL, after every shard's size was compared with the manifest: by stat, or
        by what the store says of its objects.

        cache: the folder for shards of a remote store; None is `cache_folder()`. Raises ValueError, naming folder or shard and
        the remedy, where the place is no prepared split, where the index is not the one that the manifest describes, where a
        shard is missing or has another size, and where a store refuses access.
        """
        index = cls.load(place, cache)
        index.store.check()
        return index

    @classmethod
    def load(cls, place: str | os.PathLike[str], cache: Path | None = None) -> ShardIndex:
        """The index without a look at the shards, for checks that report every defect. Raises ValueError as `open` does."""
        name, cache = os.fspath(place), cache or cache_folder()
        name = name.rstrip("/") if is_url(name) else str(Path(name))
        if is_url(name):
            folder, manifest = fetched_split(name, cache)
        else:
            folder, manifest = Path(name), read_manifest(Path(name))
            check_format(name, manifest["format"])
        try:
            index = cls(folder, manifest, _map_records(folder, manifest), name, cache)
            held = sum(shard.samples for shard in index.shards), index.num_classes
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name}/{MANIFEST}: damaged ({type(error).__name__}: {error}); prepare the split again"
            ) from error
        said = manifest["num_samples"], manifest.get("num_classes")
        if held != said:
            raise ValueError(
                f"{name}/{MANIFEST}: damaged: {said[0]} samples of {said[1]} classes, its lists have {held[0]} of {held[1]}; "
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
        """The file of shard number `shard`; of a remote one, the place of its copy in the cache."""
        return self.store.path(shard)

    def key(self, sample: int) -> str:
        """The sample's key, read from its tar header (so it costs a read: for reports)."""
        record = self.records[sample]
        header = self._header(int(record["shard"]), int(record["offset"]))
        return member_key(header.name)

    def spot_check(self) -> None:
        """Compares a sample of every shard with its checksum: finds shards replaced by others of the same size. A remote
        shard is compared when it arrives.

        Costs one small read per shard. One damaged image is no reason to stop: where the first sample differs, the middle
        and the last one have to differ too. Raises ValueError naming the shard.
        """
        if self.store.checks_arrivals:
            return
        for number in range(len(self.shards)):
            descriptor = self.store.open(number)
            try:
                self._check_samples(number, descriptor)
            except ShardLost as error:
                raise ValueError(str(error)) from error
            finally:
                os.close(descriptor)

    def _check_samples(self, shard: int, descriptor: int) -> None:
        first, count = self._firsts[shard], self.shards[shard].samples
        if count and not any(self._is_as_indexed(first + offset, descriptor) for offset in (0, count // 2, count - 1)):
            raise ShardLost(
                f"{self.store.where(shard)}: its first, middle and last image do not have the checksums of the index: the "
                "shard was replaced or damaged; restore it or prepare the split again"
            )

    @cached_property
    def _firsts(self) -> list[int]:
        return [0, *np.cumsum([shard.samples for shard in self.shards]).tolist()]

    def _is_as_indexed(self, sample: int, descriptor: int) -> bool:
        offset, _, size, _, crc32, *_ = self.records[sample].item()
        return size > 0 and zlib.crc32(os.pread(descriptor, size, offset)) == crc32

    def _header(self, shard: int, offset: int) -> tarfile.TarInfo:
        descriptor = self.store.open(shard)
        try:
            return tarfile.TarInfo.frombuf(os.pread(descriptor, TAR_BLOCK, offset - TAR_BLOCK), "utf-8", "surrogateescape")
        finally:
            os.close(descriptor)

    def _made_store(self, cache: Path) -> ShardStore:
        root = self.manifest["root"]
        if not isinstance(root, str):
            raise TypeError(f"root {root!r}")
        if is_url(root) or is_url(self.place):
            return CachedStore(store_of(self.place, self.manifest), self.shards, cache / self.digest, self._check_samples)
        return LocalStore(self.folder / root, self.shards, self.place)


def member_key(name: str) -> str:
    """A WebDataset key: the member's name up to the first dot after its last slash."""
    head, slash, tail = name.rpartition("/")
    return head + slash + tail.split(".", 1)[0]


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
