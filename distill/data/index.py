"""The shard index and the manifest of one split: schema, writing, opening, checking.

A split is a folder with `manifest.json`, `index.npy` and its shards (uncompressed tar files in the WebDataset layout). The
index has one fixed-size row per sample, in shard order, and is memory-mapped: 28 bytes a sample, 36 MB at 1.28 million,
shared by all processes of a machine.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.remote.cache import cache_folder, check_cache
from distill.data.remote.fetch import FetchError, Remote, read_object
from distill.data.remote.urls import is_url, remote_of
from distill.data.store import CachedStore, LocalStore, ShardInfo, ShardLost, ShardStore
from distill.files import file_sha256, json_bytes, locked, write_atomically, written_aside

FORMAT = 2
REMOTE_FORMAT = 3
"""With a URL as root, and each shard's ETag and version; the index is that of `FORMAT`."""
OLD_FORMAT = 1
"""Without height and width in the index; `shards/renew.py` adds them."""
MANIFEST = "manifest.json"
INDEX = "index.npy"
LOCK_SECONDS = 600.0
"""The longest that a process waits for another one of its node that fetches the index, 36 MB of ImageNet."""
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
            _check_shard(self.place, shard)
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
        if isinstance(index.store, CachedStore):
            check_cache(index.store.folder)
            index.store.check()
        else:
            index._check_sizes()
        return index

    @classmethod
    def load(cls, place: str | os.PathLike[str], cache: Path | None = None) -> ShardIndex:
        """The index without a look at the shards, for checks that report every defect. Raises ValueError as `open` does."""
        name, cache = os.fspath(place), cache or cache_folder()
        name = name.rstrip("/") if is_url(name) else str(Path(name))
        if is_url(name):
            folder, manifest = _fetched_split(name, cache)
        else:
            folder, manifest = Path(name), read_manifest(Path(name))
            _check_format(name, manifest["format"])
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
        if isinstance(self.store, CachedStore):
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
        if not is_url(root) and not is_url(self.place):
            return LocalStore([self.folder / root / shard.name for shard in self.shards])
        if is_url(root):
            if root.startswith("pipe:"):
                raise ValueError(
                    f"{self.place}: its manifest would run the command {root}; give it with --train or --val instead"
                )
            remote = remote_of(root, self.manifest.get("store"))
        else:
            remote = _below(self.place, root)
        return CachedStore(remote, self.shards, cache / self.digest, self._check_samples)

    def _check_sizes(self) -> None:
        for number, shard in enumerate(self.shards):
            path = self.shard_path(number)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise ValueError(
                    f"{path}: shard is missing ({error.strerror}); copy it again, or remove {self.place} and prepare it again"
                ) from error
            if size != shard.bytes:
                raise ValueError(
                    f"{path}: shard has {size} bytes, the manifest says {shard.bytes}; "
                    f"copy it again, or remove {self.place} and prepare it again"
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
        return parse_manifest(str(folder), (folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        splits = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = (
            f"its splits are {', '.join(splits)}: name one of them, as {folder / splits[0]}"
            if splits
            else "prepare it, or let an unfinished preparation finish, with `python shards/prepare.py`"
        )
        raise ValueError(f"{folder}: no {MANIFEST} in it, so this is no finished split; {hint}") from error


def parse_manifest(place: str, content: bytes) -> Mapping[str, Any]:
    """The manifest of the split at `place` from its bytes. Raises ValueError for any others."""
    try:
        manifest = json.loads(content)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{place}/{MANIFEST}: not readable as JSON ({error}); prepare the split again") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{place}/{MANIFEST}: damaged (no format in it); prepare the split again")
    return manifest


def _fetched_split(url: str, cache: Path) -> tuple[Path, Mapping[str, Any]]:
    """The folder of the cache in which the index of a remote split lies now, and its manifest."""
    remote = remote_of(url)
    try:
        manifest = parse_manifest(url, read_object(remote, MANIFEST))
        _check_format(url, manifest["format"])
        digest = str(manifest.get("index_sha256"))
        if re.fullmatch("[0-9a-f]{64}", digest) is None:  # it becomes the name of a folder
            raise ValueError(f"{url}/{MANIFEST}: damaged (index_sha256 {digest[:80]!r}); prepare the split again")
        folder = cache / digest
        check_cache(folder)
        with locked(folder, wait_seconds=LOCK_SECONDS):  # the processes of a node open the split at the same moment
            if not (folder / INDEX).is_file() or file_sha256(folder / INDEX) != digest:
                write_atomically(folder / INDEX, read_object(remote, INDEX))
    except FetchError as error:
        raise ValueError(f"{error}; --train and --val take the place of a prepared split, which has a {MANIFEST}") from error
    return folder, manifest


def _below(url: str, root: str) -> Remote:
    """The store of the shards of a split at `url` whose manifest has a relative root. Raises ValueError for another."""
    if Path(root).is_absolute() or ".." in Path(root).parts:
        raise ValueError(
            f"{url}/{MANIFEST}: its shards lie in {root}, a folder of the machine that prepared it; index them where they lie"
            " with `python shards/prepare.py wds --source URL`"
        )
    if root == "." or url.startswith("pipe:"):
        return remote_of(url)
    return remote_of(f"{url.rstrip('/')}/{root}")


def _check_shard(place: str, shard: ShardInfo) -> None:
    """Raises ValueError for a shard outside of the manifest's root, TypeError for one whose name and tags are no text."""
    name = PurePosixPath(shard.name)
    if not all(isinstance(text, str) for text in (shard.sha256, shard.etag, shard.version)):
        raise TypeError(f"shard {shard.name}: sha256, etag or version is no text")
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(
            f"{place}/{MANIFEST}: names the shard {shard.name}, which lies outside of its root; prepare the split again"
        )


def _check_format(folder: str, found: object) -> None:
    if found == OLD_FORMAT:
        raise ValueError(
            f"{folder}: prepared by an earlier version, its index has no image sizes; run "
            f"`python shards/prepare.py renew {folder}`, which writes them into the index and keeps the shards"
        )
    if found not in (FORMAT, REMOTE_FORMAT):
        raise ValueError(
            f"{folder}/{MANIFEST}: format {found}, this version reads {FORMAT} and {REMOTE_FORMAT}; prepare the split again"
        )


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
