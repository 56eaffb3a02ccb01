"""What timm publishes of its weights' accuracy: a look into `results/results-imagenet.csv` of timm's repository."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from timm.models import get_pretrained_cfg

from distill.protocols import InputSpec

COLUMNS = ("model", "top1", "img_size", "crop_pct", "interpolation")
IMAGENET_CLASSES = 1000
IMAGENET_VALIDATION = 50_000


def published_top1(table: str | Path, name: str, spec: InputSpec) -> float | None:
    """The top-1 in percent that timm measured for these weights, fed as `spec` says; None where the table has no such row.

    table: timm's CSV, which its wheel does not hold. A name without a tag means the tag that timm takes for it. The same
    weights have rows at several sizes and crops, percent points apart, so size, crop and interpolation must be the row's.
    ValueError where the file is not that table.
    """
    if not Path(table).is_file():
        raise ValueError(f"{table}: no such file; give results/results-imagenet.csv of timm's repository")
    with Path(table).open(newline="") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ValueError(f"{table}: has not the columns {', '.join(COLUMNS)} of timm's results-imagenet.csv")
        wanted = tagged(name)
        for row in rows:
            same_view = (int(row["img_size"]), row["interpolation"]) == (spec.height, spec.interpolation)
            if row["model"] == wanted and same_view and abs(float(row["crop_pct"]) - spec.crop_fraction) < 0.001:
                return float(row["top1"])
    return None


def tagged(name: str) -> str:
    """The name with the tag of the weights that timm takes for it."""
    cfg = None if "." in name or ":" in name else get_pretrained_cfg(name)
    return f"{name}.{cfg.tag}" if cfg and cfg.tag else name


def is_imagenet(class_names: Sequence[str]) -> bool:
    """Whether these are the thousand WordNet numbers of ImageNet-1k, in their order."""
    numbers = len(class_names) == IMAGENET_CLASSES and all(re.fullmatch(r"n\d{8}", name) for name in class_names)
    return numbers and list(class_names) == sorted(set(class_names))
