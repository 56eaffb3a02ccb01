"""Folders of images: what in them is a split, a class, an image, or none of these."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shards.items import FileRef, Item, Source, Split, unique_keys
from shards.splits import split_of, split_word

IMAGE_SUFFIXES = frozenset(
    (*(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"), *(".ppm", ".pgm", ".jp2", ".avif"))
)
FIRST_BYTES = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|II\*\0|MM\0\*", re.DOTALL)
"""The beginnings of images, for files whose names do not say what they are."""
JUNK = frozenset(("__macosx", "@eadir", "lost+found", "__pycache__", "$recycle.bin", "system volume information"))
"""Folders that operating systems and programs leave; thumbnails of the images may lie in them."""
JUNK_WITHOUT_IMAGES = frozenset(("log", "logs"))
"""Folders that are no class as long as they hold no image."""
KAGGLE = Path("ILSVRC/Data/CLS-LOC")
SOLUTION = "LOC_val_solution.csv"
FLAT = "; ImageNet's flat val/ from Kaggle is read by `prepare.py kaggle`"


@dataclass
class Listing:
    """The images below a folder, and what else was seen there."""

    images: list[tuple[str, Path, Path]] = field(default_factory=list)
    """Class, path below the class's folder, and file of each."""
    ignored: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, path: Path, reason: str) -> None:
        """Notes an image that cannot be read."""
        self.refused.append({"key": path.stem, "source": str(path), "reason": reason})


def folder_source(
    root: Path,
    *,
    val_name: str | None = None,
    class_order: str | None = None,
    class_names: Sequence[str] | None = None,
    one_class: bool = False,
) -> Source:
    """Images as `root/CLASS/NAME.jpg`, or so below a folder for each of the splits `train` and `val`, in any usual spelling.

    Classes are those of the training split. They are numbered by `class_names`, or by their names in plain order (torchvision,
    the default) or `natural` order (timm: numbers by their value, without case). Raises ValueError, with what was seen and what
    to give, where the folder can be understood in several ways, where there is no image, and where `val` has another class.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: not a folder; --source takes a folder of images (unpack an archive first)")
    folders, remarks = _split_folders(root, val_name, class_names)
    found = class_folders(folders["train"])
    order = class_order or "plain"
    names = _in_given_order(folders["train"], found, class_names) if class_names else tuple(ordered(found, order))
    if len(names) == 1 and not one_class:
        below = folders["train"] / names[0]
        raise ValueError(
            f"{folders['train']}: one class, {names[0]}; give --source {below} if the classes are in there, or --one-class"
        )
    if class_order is None and not class_names and (remark := _other_order(names)):
        remarks.append(remark)
    splits = {name: _folder_split(folder, names) for name, folder in folders.items()}
    origin = {"folder": root.name} if order == "plain" else {"folder": root.name, "class_order": order}
    return Source("folder", splits, origin, remarks)


def kaggle_source(root: Path) -> Source:
    """ImageNet-1k as Kaggle has it: `ILSVRC/Data/CLS-LOC/train/WNID/NAME.JPEG`, and a flat `val/` whose labels are in
    `LOC_val_solution.csv`. Raises ValueError where one of these is missing."""
    images = next((place for place in (root / KAGGLE, root / "Data/CLS-LOC", root) if (place / "train").is_dir()), None)
    if images is None:
        raise ValueError(
            f"{root}: no {KAGGLE / 'train'} in it; --source takes the folder into which Kaggle's archive was unpacked"
        )
    names = tuple(sorted(class_folders(images / "train")))
    splits = {"train": _folder_split(images / "train", names)}
    if (images / "val").is_dir():
        table = next((place / SOLUTION for place in (root, *images.parents) if (place / SOLUTION).is_file()), None)
        if table is None:
            raise ValueError(f"{root}: no {SOLUTION} in it, which has the labels of {images / 'val'}; fetch it from Kaggle too")
        splits["val"] = _kaggle_val(images / "val", table, names)
    return Source("kaggle", splits, {"folder": root.name})


def _kaggle_val(folder: Path, table: Path, names: Sequence[str]) -> Split:
    with table.open(newline="") as file:
        wnids = {row["ImageId"]: row["PredictionString"].split(" ")[0] for row in csv.DictReader(file)}
    if unknown := sorted(set(wnids.values()) - set(names)):
        raise ValueError(f"{table}: {len(unknown)} classes that the training split lacks: {', '.join(unknown[:5])}")
    found = Listing()
    for path in _walk(folder, frozenset(), found):
        if path.stem in wnids:
            found.images.append((wnids.pop(path.stem), Path(path.name), path))
        else:
            found.refuse(path, f"not in {SOLUTION}")
    for name in wnids:
        found.refuse(folder / f"{name}.JPEG", f"in {SOLUTION}, and no such file")
    return _split(found, names)


def ordered(names: Sequence[str], order: str) -> list[str]:
    """The names in `plain` order, that of their characters, or in `natural` order, in which numbers count by their value."""

    def natural(name: str) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    return sorted(names, key=natural) if order == "natural" else sorted(names)


def _other_order(names: Sequence[str]) -> str | None:
    """A remark where timm would give the classes other numbers."""
    theirs = ordered(names, "natural")
    for number, (ours, other) in enumerate(zip(names, theirs, strict=True)):
        if ours != other:
            return (
                f"classes are numbered in plain order of their names, as torchvision does: {number} is {ours!r}; timm orders"
                f" them naturally and without case: {number} is {other!r}; for weights trained so give --class-order natural"
            )
    return None


def _in_given_order(root: Path, found: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    if missing := sorted(set(found) - set(names)):
        raise ValueError(f"{root}: {len(missing)} classes that --class-names lacks: {', '.join(missing[:5])}; add them")
    if twice := [name for name, number in Counter(names).items() if number > 1]:
        raise ValueError(f"--class-names: {twice[0]} is there twice; leave one")
    return tuple(names)


def _split_folders(root: Path, val_name: str | None, class_names: Sequence[str] | None) -> tuple[dict[str, Path], list[str]]:
    """The folder of each split, and remarks. A folder that `class_names` has is a class, whatever its name."""
    names = [name for name in class_folders(root, required=False) if name not in (class_names or ())]
    words = [name for name in names if split_word(name) or name == val_name]
    trains = [name for name in words if split_of(split_word(name) or "val") == "train"]
    held = [name for name in words if name not in trains]
    if val_name is not None and val_name not in held:
        raise ValueError(f"--val-name {val_name}: {root} has {', '.join(names) or 'no folders'}; name one that is not train")
    if not words:
        if not class_names:
            _refuse_splits_below(root, names)
        return {"train": root}, []
    if not trains:
        raise ValueError(
            f"{root}: has {' and '.join(held)}, but no train; to prepare one split, give its folder as --source; where these"
            " are classes, name all classes with --class-names FILE"
        )
    if len(trains) > 1:
        raise ValueError(f"{root}: has {' and '.join(trains)}, any of which could become train; leave one")
    if len(held) > 1 and val_name is None:
        raise ValueError(f"{root}: has {' and '.join(held)}, any of which could become val; choose one with --val-name NAME")
    chosen = {"train": root / trains[0]} | ({"val": root / (val_name or held[0])} if held else {})
    unread = [name for name in names if root / name not in chosen.values()]
    remarks = [f"{name} is {folder.name}" for name, folder in chosen.items() if name != folder.name]
    return chosen, [*remarks, *([f"not read: {', '.join(unread)}"] if unread else [])]


def _refuse_splits_below(root: Path, names: Sequence[str]) -> None:
    """Raises ValueError where the folders of `root` hold splits: it is one level too high, or splits lie inside of classes."""
    holders = {}
    for name in names:
        words = [below for below in class_folders(root / name, required=False) if split_word(below)]
        if any(split_of(split_word(word) or "") == "train" for word in words):
            holders[name] = words
    if not holders:
        return
    name, words = next(iter(holders.items()))
    if len(holders) == 1:
        raise ValueError(f"{root}: its folder {name} holds {' and '.join(words)}; give --source {root / name}")
    raise ValueError(
        f"{root}: {len(holders)} of its folders, such as {name}, hold {' and '.join(words)}; images are expected as"
        " train/CLASS/NAME.jpg and val/CLASS/NAME.jpg: move them, or name the classes with --class-names if these are no splits"
    )


def class_folders(root: Path, required: bool = True) -> list[str]:
    """The folders in `root` that may be classes or splits, by name. Raises ValueError where one is required and none there."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _is_junk(root / entry.name))
    if not names and required:
        flat = Listing()
        images = sum(1 for _ in _walk(root, frozenset(), flat))
        raise ValueError(
            f"{root}: no class folders in it, and {images:,} images; images are expected as CLASS/NAME.jpg below it"
            + (FLAT if images else "")
        )
    return names


def _is_junk(folder: Path) -> bool:
    name = folder.name.lower()
    if name in JUNK_WITHOUT_IMAGES:
        return next(_walk(folder, frozenset(), Listing()), None) is None
    return name in JUNK or name.startswith(".")


def _folder_split(root: Path, class_names: Sequence[str]) -> Split:
    found = Listing()
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = root / entry.name
            if entry.is_dir():
                if _is_junk(path):
                    found.ignored["folders of other programs"] += 1
                elif entry.name not in class_names:
                    _refuse_unknown(root, class_names)
            elif entry.is_symlink() and not path.exists():
                found.refuse(path, "a link to nothing")
            else:
                found.ignored[f"{'images' if is_image(path) else 'files'} beside the class folders"] += 1
    above = frozenset(_identity(path) for start in (root.absolute(), root.resolve()) for path in (start, *start.parents))
    for name in class_names:
        if (root / name).is_dir():  # a class of the training split may have no image here
            found.images += [(name, path.relative_to(root / name), path) for path in _walk(root / name, above, found)]
    if not found.images and not found.refused:
        seen = ", ".join(f"{number:,} {what}" for what, number in found.ignored.items()) or "nothing"
        flat = FLAT if "images beside the class folders" in found.ignored else ""
        raise ValueError(
            f"{root}: no images in folders of its {len(class_names)} classes, as CLASS/NAME.jpg; seen: {seen}{flat}"
        )
    return _split(found, class_names)


def _refuse_unknown(root: Path, class_names: Sequence[str]) -> None:
    unknown = sorted(set(class_folders(root)) - set(class_names))
    raise ValueError(f"{root}: {len(unknown)} classes that the training split lacks: {', '.join(unknown[:5])}")


def _split(found: Listing, class_names: Sequence[str]) -> Split:
    number = {name: label for label, name in enumerate(class_names)}
    keys = unique_keys(_key_text(name, below) for name, below, _ in found.images)
    items = []
    for key, (name, _, path) in zip(keys, found.images, strict=True):
        stat = path.stat()
        items.append(Item(key, number[name], FileRef(str(path), stat.st_size, stat.st_mtime_ns)))
    return Split(tuple(class_names), items, found.ignored, found.refused)


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its extension; by its first bytes where that is none that is known."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with path.open("rb") as file:
        return FIRST_BYTES.match(file.read(16)) is not None


def _walk(folder: Path, above: frozenset[tuple[int, int]], found: Listing) -> Iterator[Path]:
    """Every image below the folder, through links as torchvision's ImageFolder goes, in an order of the names alone."""
    above |= {_identity(folder)}
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    folders = []
    for entry in listed:
        path = folder / entry.name
        if entry.is_dir():
            folders.append(path)
        elif entry.name.startswith("."):
            found.ignored["hidden files"] += 1
        elif entry.is_symlink() and not path.exists():
            found.refuse(path, "a link to nothing")
        elif is_image(path):
            yield path
        else:
            found.ignored["files that are no images"] += 1
    for below in folders:
        if _is_junk(below):
            found.ignored["folders of other programs"] += 1
        elif _identity(below) not in above:  # a link to a folder that it lies in would lead round for ever
            yield from _walk(below, above, found)


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _key_text(class_name: str, path: Path) -> str:
    """The file's stem, with its class in front unless it begins with it (as ImageNet's names do)."""
    stem = str(path.with_suffix(""))
    return stem if stem.startswith(class_name) else f"{class_name}_{stem}"
