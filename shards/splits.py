"""The splits that names of folders and shards speak of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from braceexpand import braceexpand

WORD = re.compile(r"(train|training|val|valid|validation|test|testing|eval|evaluation|dev)[-_ ]?\d*")
INFO_NAMES = ("_info.json", "info.json")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
"""The first bytes of a compressed file, whatever its name -> the command that unpacks it."""
COMPRESSED_NAMES = (".tgz", ".gz", ".bz2", ".xz", ".zst")
ASSIGN = "assign them with --split train=PATTERN --split val=PATTERN"


def split_word(name: str) -> str | None:
    """The word for a split that a name is, in any case and with digits behind it: `validation` for `Validation2`."""
    match = WORD.fullmatch(name.lower())
    return match[1] if match else None


def split_of(word: str) -> str:
    """The split that such a word stands for: `train`, or `val` for all that is held out."""
    return "train" if word.startswith("train") else "val"


def find_splits(source: Path, asked: Mapping[str, str] | None = None) -> dict[str, list[Path]]:
    """The shards of each split: those that match the pattern in `asked`; or as `_info.json` says; or by words in their names.

    Shards whose names are one series without such a word are `train`. Raises ValueError where there are none, where names fall
    into series of which not all say a split, and for compressed shards.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: not a folder; --source takes the folder that holds the shards")
    info = next((source / name for name in INFO_NAMES if (source / name).is_file()), None)
    if asked:
        found = _by_patterns(source, asked)
    elif info is not None:
        found = _by_info(info)
    else:
        found = _by_names(source)
    for shard in chain(*found.values()):
        _refuse_compressed(shard)
    return dict(sorted(found.items()))


def _all_shards(source: Path) -> list[Path]:
    shards = sorted(source.rglob("*.tar"))
    if not shards:
        packed = sorted(path for path in source.rglob("*") if path.suffix in COMPRESSED_NAMES)
        for path in packed:
            _refuse_compressed(path)
        raise ValueError(f"{source}: no .tar files in it")
    return shards


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(max(map(len, COMPRESSED)))
    if tool := next((tool for magic, tool in COMPRESSED.items() if start.startswith(magic)), None):
        plain = path.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar") + ".tar"
        raise ValueError(
            f"{path}: compressed, so that no image in it can be read alone; unpack it and its like, each with"
            f" `{tool} < {path.name} > {'unpacked/' if plain == path.name else ''}{plain}`"
        )


def _by_patterns(source: Path, asked: Mapping[str, str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for name, pattern in asked.items():
        found[name] = sorted({path for each in braceexpand(pattern) for path in source.glob(each) if path.is_file()})
        if not found[name]:
            shards = _all_shards(source)
            raise ValueError(
                f"--split {name}={pattern}: none of the {len(shards)} shards in {source} is so, such as"
                f" {shards[0].relative_to(source)}; a pattern is as *train*.tar or train-{{0000..0012}}.tar"
            )
    if twice := [path for path in found.get("train", []) if path in found.get("val", [])]:
        raise ValueError(f"--split: {twice[0]} would be in train and val; give patterns that take each shard once")
    return found


def _by_info(info: Path) -> dict[str, list[Path]]:
    try:
        listed = {
            split: [content["filenames"]] if isinstance(content["filenames"], str) else list(content["filenames"])
            for split, content in json.loads(info.read_text())["splits"].items()
        }
        named = {split: [name for text in texts for name in braceexpand(text)] for split, texts in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{info}: no splits with their filenames in it ({error!r}); mend or remove it, or give --split train=PATTERN"
        ) from error
    return _renamed({split: [_listed(info, name) for name in names] for split, names in named.items()}, info.parent)


def _listed(info: Path, name: str) -> Path:
    """A shard that `_info.json` names; an absolute name of another machine is looked for beside the file."""
    for path in (info.parent / name, info.parent / Path(name).name):
        if path.is_file():
            return path
    raise ValueError(f"{info}: names {name}, which is not there; fetch that shard, or mend the file")


def _by_names(source: Path) -> dict[str, list[Path]]:
    series: dict[str, list[Path]] = {}
    words: dict[str, list[Path]] = {}
    for shard in _all_shards(source):
        name = str(shard.relative_to(source))
        word = next((word for word in re.split(r"[^a-z]+", name.lower()) if split_word(word)), None)
        if word is None:
            series.setdefault(re.sub(r"\d+", "#", name), []).append(shard)
        else:
            words.setdefault(word, []).append(shard)
    if not words and len(series) == 1:
        return {"train": next(iter(series.values()))}
    if series:
        said = [f"{name} ({len(paths)})" for name, paths in series.items()]
        known = [f"{word} ({len(paths)})" for word, paths in words.items()]
        others = f", beside shards of {', '.join(known)}" if known else ""
        raise ValueError(f"{source}: no split is said by the names {', '.join(_short(said))}{others}; {ASSIGN}")
    return _renamed(words, source)


def _short(texts: list[str]) -> Iterator[str]:
    yield from texts[:5]
    if len(texts) > 5:
        yield f"and {len(texts) - 5} more"


def _renamed(found: dict[str, list[Path]], source: Path) -> dict[str, list[Path]]:
    """The same shards under our names of the splits. Raises ValueError where two splits become one."""
    splits: dict[str, list[Path]] = {}
    for word, paths in found.items():
        name = split_of(word) if split_word(word) else word
        if name in splits:
            both = " and ".join(sorted(other for other in found if split_word(other) and split_of(other) == name))
            raise ValueError(f"{source}: has {both}, any of which could become {name}; {ASSIGN}")
        splits[name] = paths
    return splits


def parse_assignments(texts: Iterable[str]) -> dict[str, str]:
    """`train=PATTERN` and `val=PATTERN` by their names. Raises ValueError for any other text."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, pattern = text.partition("=")
        if name not in ("train", "val") or not pattern or name in found or Path(pattern).is_absolute():
            raise ValueError(f"--split {text}: give train=PATTERN, val=PATTERN or both, each once, relative to --source")
        found[name] = pattern
    return found
