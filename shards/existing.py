"""Shards that exist already, such as timm's ImageNet ones: indexed and verified where they lie, nothing in them changed."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.index import RECORD, ShardInfo, member_key
from distill.data.reader import BadSample, check_bytes
from shards.images import Unclean, clean_image
from shards.jobs import IndexJob, ShardResult, read_marker, write_marker
from shards.tarwalk import BrokenTar, Member, walk_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MOST_CLASSES = 1_000_000
"""The number of classes that is assumed where nobody gives it. A larger label is no class number: the class map, with a name
for every number below it, would fill the memory."""
SPLIT_WORDS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "val"}


def find_splits(source: Path) -> dict[str, list[Path]]:
    """The shards of each split: as `_info.json` says, or by `train`, `val`, `validation`, `valid`, `test` in their names.

    Shards whose names say nothing are one split, `train`. Raises ValueError where there are none or some say nothing.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: not a folder; --source takes the folder that holds the shards")
    for name in ("_info.json", "info.json"):
        if (source / name).is_file():
            try:
                content = json.loads((source / name).read_text())["splits"]
                return _renamed({split: [source / file for file in content[split]["filenames"]] for split in content}, source)
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{source / name}: no splits with their filenames in it ({error!r}); mend or remove it"
                ) from error
    shards = sorted(source.rglob("*.tar"))
    if not shards:
        raise ValueError(f"{source}: no .tar files in it")
    found: dict[str, list[Path]] = {}
    for shard in shards:
        words = re.split(r"[^a-z]+", str(shard.relative_to(source)).lower())
        split = next((word for word in words if word in SPLIT_WORDS), "")
        found.setdefault(split, []).append(shard)
    if "" in found and len(found) > 1:
        raise ValueError(f"{found[''][0]}: its name says no split, those of other shards do; add an _info.json")
    return _renamed({split or "train": paths for split, paths in found.items()}, source)


def _renamed(found: dict[str, list[Path]], source: Path) -> dict[str, list[Path]]:
    """The same shards under our names of the splits. Raises ValueError where two splits become one."""
    splits: dict[str, list[Path]] = {}
    for word, paths in found.items():
        name = SPLIT_WORDS.get(word, word)
        if name in splits:
            both = " and ".join(sorted(other for other in found if SPLIT_WORDS.get(other, other) == name))
            raise ValueError(f"{source}: has {both}, any of which could become {name}; leave one, or name it in an _info.json")
        splits[name] = paths
    return splits


def index_shard(job: IndexJob) -> ShardResult:
    """Walks, decodes and checksums every sample of a shard; samples that cannot serve are left out of the index.

    Raises BrokenTar, naming the shard, where its headers cannot be walked to the end, and OSError.
    """
    done = read_marker(job)
    if done is not None:
        return done
    path = Path(job.path)
    sha = hashlib.sha256()
    rows: list[tuple[int, ...]] = []
    quarantine: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
        size = file.tell()
        try:
            samples, repeated = _samples(list(walk_tar(file)))
        except BrokenTar as error:
            raise BrokenTar(f"{path}: {error}; fetch the shard again") from error
        for key, members in samples.items():
            told: dict[str, Any] = {"key": key, "source": job.path}
            try:
                image, label = _image_member(members), _label(file, members, job)
                data = _content(file, image)
                clean = clean_image(data)
                crc32 = zlib.crc32(data)
                check_bytes(data, crc32)  # what the reader will ask of it
            except (Unclean, BadSample) as error:
                quarantine.append({**told, "reason": str(error)})
                continue
            kept = "" if clean.data is data else "; not here, the shard stays as it is"
            notes.extend({**told, "label": label, "note": note + kept} for note in clean.notes)
            rows.append((image.offset, job.number, image.size, label, crc32, *clean.size))
    quarantine += [{"key": key, "source": job.path, "reason": "another sample before it has this key"} for key in repeated]
    shard = ShardInfo(job.name, len(rows), size, sha.hexdigest())
    result = ShardResult(job.number, shard, size, len(samples) + len(repeated), quarantine, notes)
    write_marker(job, result, np.array(rows, RECORD))
    return result


def _samples(members: Sequence[Member]) -> tuple[dict[str, dict[str, Member]], list[str]]:
    """Members by key and extension, in the order in which the keys appear; and the keys of images whose key came before."""
    samples: dict[str, dict[str, Member]] = {}
    repeated = []
    for member in members:
        key = member_key(member.name)
        extension = member.name[len(key) + 1 :].lower()
        if samples.setdefault(key, {}).setdefault(extension, member) is not member and extension in IMAGE_EXTENSIONS:
            repeated.append(key)
    return samples, repeated


def _image_member(members: dict[str, Member]) -> Member:
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise Unclean(f"no image: the sample has {', '.join(sorted(members))}")


def _label(file: Any, members: dict[str, Member], job: IndexJob) -> int:
    json_label = job.json_label
    extension = "cls" if json_label is None else "json"
    if extension not in members:
        raise Unclean(f"no label: the sample has {', '.join(sorted(members))}")
    text: object = _content(file, members[extension]).decode("utf-8", "replace").strip()
    if json_label is not None:
        try:
            text = json.loads(str(text)).get(json_label)
        except (json.JSONDecodeError, AttributeError) as error:
            raise Unclean("its .json cannot be read") from error
    if not str(text).isascii() or not str(text).isdigit():
        raise Unclean(f"label {text!r} is no class number")
    most = MOST_CLASSES if job.num_classes is None else job.num_classes
    if len(str(text)) > len(str(MOST_CLASSES)) or int(str(text)) >= most:
        raise Unclean(f"label {str(text)[:20]}: there are {most} classes at most")
    return int(str(text))


def _content(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
