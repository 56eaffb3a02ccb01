"""The source that needs no files: the digits of scikit-learn."""

from __future__ import annotations

from shards.digits import CLASS_NAMES, SIDE, load_digits_split
from shards.items import Item, PixelsRef, Source, Split


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
