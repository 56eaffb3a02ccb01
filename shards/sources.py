"""Sources of labelled images: each lists its splits without reading an image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from shards.digits import CLASS_NAMES, SIDE, load_digits_split
from shards.items import FileRef, Item, PixelsRef, Source, Split, unique_keys

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif"))
VAL_NAMES = ("val", "validation", "valid", "test")


def folder_source(root: Path) -> Source:
    """Images as `root/class/name.jpg`, or so below `root/train` and `root/val` (also `test`, `validation`, `valid`).

    A flat folder is one split, `train`. Classes are numbered by their sorted names in the training split. Raises ValueError
    where there is no such folder, no class or no image in it, and where `val` has a class that `train` lacks.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: not a folder; --source takes a folder of images (unpack an archive first)")
    if not (root / "train").is_dir():
        classes = _class_folders(root)
        if set(classes) <= set(VAL_NAMES):
            raise ValueError(
                f"{root}: has {' and '.join(classes)}, but no train; to prepare one split, give its folder as --source"
            )
        return Source("folder", {"train": _folder_split(root, classes)}, {"folder": root.name})
    classes = _class_folders(root / "train")
    splits = {"train": _folder_split(root / "train", classes)}
    held_out = [name for name in VAL_NAMES if (root / name).is_dir()]
    if len(held_out) > 1:
        raise ValueError(f"{root}: has {' and '.join(held_out)}, any of which could become val; leave one")
    if held_out:
        splits["val"] = _folder_split(root / held_out[0], classes)
    return Source("folder", splits, {"folder": root.name})


def _class_folders(root: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{root}: no class folders in it; images are expected as CLASS/NAME.jpg below it")
    return tuple(names)


def _folder_split(root: Path, class_names: tuple[str, ...]) -> Split:
    unknown = sorted(set(_class_folders(root)) - set(class_names))
    if unknown:
        raise ValueError(f"{root}: {len(unknown)} classes that the training split lacks: {', '.join(unknown[:5])}")
    names: list[str] = []
    refs: list[FileRef] = []
    labels: list[int] = []
    ignored = 0
    for label, class_name in enumerate(class_names):
        if not (root / class_name).is_dir():  # a class of the training split that this one has no image of
            continue
        for path in _files(root / class_name):
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                ignored += 1
                continue
            stat = path.stat()
            names.append(_key_text(class_name, path.relative_to(root / class_name)))
            refs.append(FileRef(str(path), stat.st_size, stat.st_mtime_ns))
            labels.append(label)
    if not refs:
        raise ValueError(
            f"{root}: no images in its {len(class_names)} class folders (looked for {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    items = [Item(*row) for row in zip(unique_keys(names), labels, refs, strict=True)]
    return Split(class_names, items, ignored)


def _files(folder: Path) -> Iterator[Path]:
    """Every visible file below the folder, through links as torchvision's ImageFolder goes, in an order of the names alone."""
    above = frozenset(_identity(path) for start in (folder.absolute(), folder.resolve()) for path in start.parents)
    yield from _walk(folder, above)


def _walk(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    above |= {_identity(folder)}
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    folders = [folder / entry.name for entry in entries if entry.is_dir()]
    yield from (folder / entry.name for entry in entries if not entry.is_dir())
    for below in folders:
        if _identity(below) not in above:  # a link to a folder that it lies in would lead round for ever
            yield from _walk(below, above)


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _key_text(class_name: str, path: Path) -> str:
    """The file's stem, with its class in front unless it begins with it (as ImageNet's names do)."""
    stem = str(path.with_suffix(""))
    return stem if stem.startswith(class_name) else f"{class_name}_{stem}"


def digits_source() -> Source:
    """The 1,797 scans that scikit-learn embeds, as 32 x 32 JPEG files; a fifth of each class is `val`."""
    splits = {}
    for name in ("train", "val"):
        digits = load_digits_split(name)
        items = [
            Item(
                f"digit{row:04d}",
                int(label),
                PixelsRef(image.tobytes(), SIDE, SIDE, "JPEG", f"scikit-learn digits, row {row}"),
            )
            for image, label, row in zip(digits.images, digits.labels, digits.rows, strict=True)
        ]
        splits[name] = Split(CLASS_NAMES, items)
    return Source("digits", splits, {"package": "scikit-learn"})
