"""Shards that exist already, such as timm's ImageNet ones: indexed and verified where they lie, nothing in them changed."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from distill.data.index import RECORD, ShardInfo, member_key
from distill.data.reader import BadSample, check_bytes
from shards.images import Unclean, clean_image
from shards.jobs import IndexJob, ShardResult, read_marker, write_marker
from shards.remote import opened_shard
from shards.tarwalk import BrokenTar, Member, walk_tar

IMAGES = ("jpg", "jpeg", "png", "webp", "jfif", "jpe", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "jp2", "avif", "img", "image")
"""Last parts of the names of fields that are images, the one to take first where a sample has several."""
LABELS = ("cls", "label", "index", "class", "target", "cls.txt", "label.txt", "txt", "json")
"""Fields that may hold the label, in the order in which they are looked for."""
JSON_LABELS = ("label", "cls", "class", "target")
DOTS = "where a key has a dot, at which it ends for every WebDataset reader, write shards with other keys"
INT64 = 8
"""Bytes of a label that was written as it lies in memory."""
MOST_CLASSES = 1_000_000
"""The number of classes that is assumed where nobody gives it. A larger label is no class number: the class map, with a name
for every number below it, would fill the memory."""


def index_shard(job: IndexJob) -> ShardResult:
    """Walks, decodes and checksums every sample of a shard; samples that cannot serve are left out of the index.

    Raises BrokenTar, naming the shard, where its headers cannot be walked to the end, and OSError.
    """
    done = read_marker(job)
    if done is not None:
        return done
    sha = hashlib.sha256()
    rows: list[tuple[int, ...]] = []
    quarantine: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    with opened_shard(job) as file:
        while block := file.read(1 << 20):
            sha.update(block)
        size = file.tell()
        try:
            samples, repeated, hidden = _samples(list(walk_tar(file, marked=False)))
        except BrokenTar as error:
            raise BrokenTar(f"{job.path}: {error}; fetch or write the shard again") from error
        for key, members in samples.items():
            told: dict[str, Any] = {"key": key, "source": job.path}
            try:
                field, several = _image_field(members, job)
                image, label = members[field], _label(file, members, job)
                data = _content(file, image)
                clean = clean_image(data)
                crc32 = zlib.crc32(data)
                check_bytes(data, crc32)  # what the reader will ask of it
            except (Unclean, BadSample) as error:
                quarantine.append({**told, "reason": str(error)})
                continue
            kept = "" if clean.data is data else "; not here, the shard stays as it is"
            told["label"] = label
            notes.extend({**told, "note": note + kept} for note in clean.notes)
            notes.extend({**told, "note": several} for _ in range(several is not None))
            rows.append((image.offset, job.number, image.size, label, crc32, *clean.size))
    quarantine += [{"key": key, "source": job.path, "reason": "another sample before it has this key"} for key in repeated]
    _, etag, version = (size, "", "") if job.remote is None else job.remote.facts
    shard = ShardInfo(job.name, len(rows), size, sha.hexdigest(), etag, version)
    result = ShardResult(job.number, shard, size, len(samples) + len(repeated), quarantine, notes, _counted(hidden))
    write_marker(job, result, np.array(rows, RECORD))
    return result


def _counted(hidden: int) -> dict[str, int]:
    return {"hidden files": hidden} if hidden else {}


def _samples(members: Sequence[Member]) -> tuple[dict[str, dict[str, Member]], list[str], int]:
    """Members by key and field, in the order in which the keys appear; keys of images whose key came before; and how many
    files are those that macOS puts beside others, or hidden."""
    samples: dict[str, dict[str, Member]] = {}
    repeated, hidden = [], 0
    for member in members:
        if member.name.rpartition("/")[2].startswith(".") or "__MACOSX" in member.name.split("/"):
            hidden += 1
            continue
        key = member_key(member.name)
        field = member.name[len(key) + 1 :].lower()
        if samples.setdefault(key, {}).setdefault(field, member) is not member and _is_image(field):
            repeated.append(key)
    return samples, repeated, hidden


def _is_image(field: str) -> bool:
    return field.rpartition(".")[2] in IMAGES


def _image_field(members: dict[str, Member], job: IndexJob) -> tuple[str, str | None]:
    """The field of the image, and a note where it was taken out of several."""
    has = ", ".join(sorted(members)[:6])
    if job.image is not None:
        if job.image.lower() not in members:
            raise Unclean(f"no {job.image}: the sample has {has}")
        return job.image.lower(), None
    found = [field for field in members if _is_image(field)]
    if not found:
        raise Unclean(f"no image: the sample has {has}; give its field with --image")
    if len(found) == 1:
        return found[0], None
    plain = sorted((field for field in found if "." not in field), key=IMAGES.index)  # `jpg` beside `seg.png`
    if not plain:
        raise Unclean(f"{len(found)} images: the sample has {has}; name one with --image, or, {DOTS}")
    return plain[0], f"{len(found)} images, {plain[0]} taken; --image names another"


def _label(file: Any, members: dict[str, Member], job: IndexJob) -> int:
    wanted = job.label or ("json" if job.json_label else None)
    field = wanted.lower() if wanted else next((name for name in LABELS if name in members), "")
    if field not in members:
        what = "give its field with --label or --json-label" if wanted is None else f"{wanted} was asked for"
        if wanted is None and any(name.rpartition(".")[2] in LABELS for name in members):
            what += f"; {DOTS}"
        raise Unclean(f"no label: the sample has {', '.join(sorted(members)[:6])}; {what}")
    value: object = label_text(_content(file, members[field]))
    if field == "json" or job.json_label:
        value = _json_value(str(value), job.json_label)
    return _class_number(value, job)


def label_text(data: bytes) -> str:
    """The text of a label's field; that of the number where it was written as int64 lies in memory."""
    if len(data) == INT64 and not data[INT64 // 2 :].strip(b"\0"):  # no text has the upper half of a class number
        return str(int.from_bytes(data, "little"))
    return data.decode("utf-8", "replace").strip()


def _json_value(text: str, path: str | None) -> object:
    """The value at `path`, whose parts are divided by dots, in a JSON text; that of a usual name where there is no path."""
    try:
        value = json.loads(text)
        if path is None:
            path = next((name for name in JSON_LABELS if name in value), JSON_LABELS[0])
        for part in path.split("."):
            value = value[part]
    except (ValueError, KeyError, TypeError) as error:
        raise Unclean(f"no label in its .json at {path or 'label'} ({error!r}); give the field with --json-label") from error
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return value


def _class_number(value: object, job: IndexJob) -> int:
    text = str(value)
    if not text.isascii() or not text.isdigit():
        if job.class_names is None:
            raise Unclean(f"label {value!r:.40} is no class number; where it is a name, give the names with --class-names")
        if text not in job.class_names:
            raise Unclean(f"label {value!r:.40} is no class number, and no name of --class-names")
        return job.class_names.index(text)
    most = MOST_CLASSES if job.class_names is None else len(job.class_names)
    if len(text.lstrip("0")) > len(str(MOST_CLASSES)) or int(text) >= most:
        raise Unclean(f"label {text[:20]}: there are {most} classes at most")
    return int(text)


def _content(file: Any, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)
