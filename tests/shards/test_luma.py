"""Preparation looks at the luma of colour JPEGs only: it refuses what a decoder of all colours refuses, and nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from distill.data.reader import TAIL
from shards.images import Clean, Unclean, clean_image
from tests.distill.data.conftest import picture
from tests.distill.data.planting import encoded


def spoiled(data: bytes, kind: int, rng: np.random.Generator) -> bytes:
    """The bytes cut off, with some changed, with a hole of zeros, or with a piece taken out."""
    broken = bytearray(data)
    place = int(rng.integers(len(broken)))
    if kind == 0:
        del broken[place:]
    elif kind == 1:
        for changed in rng.integers(len(broken), size=5):
            broken[changed] = rng.integers(256)
    elif kind == 2:
        hole = broken[place : place + 20]
        broken[place : place + 20] = bytes(len(hole))
    else:
        del broken[place : place + int(rng.integers(1, 200))]
    return bytes(broken)


def refused(data: bytes, resize_short: int | None) -> bool:
    try:
        clean_image(data, resize_short)
    except Unclean:
        return True
    return False


def test_what_is_refused_by_its_luma_is_what_is_refused_by_its_colours():
    rng = np.random.default_rng(0)
    verdicts = []
    for number in range(240):
        options = {"quality": 85, "subsampling": number % 3, "progressive": number % 2 == 0}
        data = spoiled(encoded(picture(60, 80, seed=number), **options), number % 4, rng)
        # shrinking needs the colours; no image is larger than this, so nothing is shrunk
        verdicts.append((refused(data, None), refused(data, 10_000)))
    assert all(by_luma == by_colours for by_luma, by_colours in verdicts)
    assert 60 < sum(by_luma for by_luma, _ in verdicts) < 180


@pytest.mark.parametrize("resize_short", [None, 32])
def test_what_is_kept_or_made_has_its_colours(resize_short):
    data = encoded(picture(60, 80, seed=1), quality=95, subsampling=0)
    kept = clean_image(data, resize_short)
    assert (kept == Clean(data, "jpg", (60, 80))) == (resize_short is None)
    with_junk_behind = clean_image(data + bytes(2 * TAIL), resize_short)
    for made in (kept, with_junk_behind):
        colours = np.asarray(Image.open(io.BytesIO(made.data)).convert("RGB"), np.int64)
        assert np.ptp(colours, axis=2).mean() > 10
