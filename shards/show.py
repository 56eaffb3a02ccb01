"""What is in a prepared split, for people: counts, sizes, and a sheet of some images with their class names."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from distill.data.index import ShardIndex
from distill.data.order import permutation
from distill.data.reader import SampleReader
from distill.seeds import derive_seed

TILE = 112
TEXT_HEIGHT = 14
COLUMNS = 8


def describe(index: ShardIndex) -> str:
    """Some lines of text: samples, classes and how even they are, shards, sizes, what was refused."""
    counts = np.bincount(index.records["label"], minlength=index.num_classes)
    sizes = index.records["size"]
    total = sum(shard.bytes for shard in index.shards)
    lines = [
        f"{index.place}: {index.num_samples:,} images of {index.num_classes:,} classes, {total / 1e6:,.1f} MB "
        f"in {len(index.shards)} shards",
        f"  images a class: {counts.min()} to {counts.max()}, median {int(np.median(counts))}; "
        f"{int((counts == 0).sum())} classes have none",
        f"  encoded sizes: {sizes.min():,} to {sizes.max():,} bytes, mean {sizes.mean():,.0f}" if len(sizes) else "  no images",
        f"  refused: {index.manifest['quarantined']} (quarantine.jsonl), notes: {index.manifest['noted']} (notes.jsonl)",
        f"  source: {index.manifest['plan']['source']}; index {index.digest[:12]}",
    ]
    largest = np.argsort(-counts, kind="stable")[:10]
    lines.append("  largest classes: " + ", ".join(f"{index.class_names[label]} {counts[label]}" for label in largest))
    return "\n".join(lines)


def contact_sheet(indices: Sequence[ShardIndex], count: int) -> Image.Image:
    """`count` images of each split, drawn at random, each with its class name below."""
    rows = [-(-min(count, index.num_samples) // COLUMNS) for index in indices]
    sheet = Image.new("RGB", (COLUMNS * TILE, max(1, sum(rows)) * (TILE + TEXT_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for index, height in zip(indices, rows, strict=True):
        _paste_split(sheet, draw, index, min(count, index.num_samples), top)
        top += height * (TILE + TEXT_HEIGHT)
    return sheet


def _paste_split(sheet: Image.Image, draw: ImageDraw.ImageDraw, index: ShardIndex, count: int, top: int) -> None:
    reader = SampleReader(index)
    chosen = permutation(derive_seed(0, "sheet", index.num_samples), index.num_samples)[:count]
    for place, sample in enumerate(chosen.tolist()):
        image = Image.open(io.BytesIO(reader.read(sample).tobytes())).convert("RGB")
        factor = (TILE - 4) / max(image.size)
        image = image.resize(
            (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.LANCZOS
        )
        row, column = divmod(place, COLUMNS)
        corner = (column * TILE + 2, top + row * (TILE + TEXT_HEIGHT) + 2)
        sheet.paste(image, corner)
        name = index.class_names[int(index.records[sample]["label"])]
        text = name[:18].encode(errors="replace").decode()
        draw.text((corner[0], corner[1] + TILE - 3), text, fill="black")
    reader.close()


def write_sheet(indices: Sequence[ShardIndex], count: int, path: Path) -> None:
    """Writes the contact sheet as PNG."""
    contact_sheet(indices, count).save(path, "PNG")
