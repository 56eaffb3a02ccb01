"""Small real splits for the tests of the data room: images made here, written by the project's own preparation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.index import ShardIndex
from shards.folders import folder_source
from shards.preparation import Options, prepare
from tests.distill.data.planting import encoded

SIZES = ((48, 64), (33, 57), (97, 41), (120, 121), (32, 32), (75, 200), (64, 64), (181, 90), (50, 51), (21, 19))
REAL_IMAGES = Path(__file__).resolve().parents[3] / "../shared/data"


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth random colour picture with some fine detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    return Image.fromarray(np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8))


def write_images(root: Path, count: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """`count` JPEG pictures in three classes, of all kinds that shards hold: 4:4:4, 4:2:0, progressive, grey, CMYK, PNG."""
    for number in range(count):
        image = picture(*sizes[number % len(sizes)], seed=number)
        folder = root / ("apple", "bear", "cat")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        kind = number % 7
        if kind == 5:
            (folder / f"{number:03d}.png").write_bytes(encoded(image, "PNG"))
            continue
        image = image.convert("L") if kind == 3 else image.convert("CMYK") if kind == 4 else image
        options = {"quality": 90, "subsampling": (0, 2)[number % 2] if kind not in (3, 4) else 0, "progressive": kind == 6}
        (folder / f"{number:03d}.jpg").write_bytes(encoded(image, **options))


MakeSplit = Callable[..., ShardIndex]


@pytest.fixture(scope="session")
def make_split(tmp_path_factory: pytest.TempPathFactory) -> MakeSplit:
    """Makes a split of `count` pictures in `shards` shards; the same arguments give the same split."""
    made: dict[tuple, ShardIndex] = {}

    def make(count: int = 53, shards: int = 3, sizes: tuple[tuple[int, int], ...] = SIZES) -> ShardIndex:
        if (count, shards, sizes) not in made:
            root = tmp_path_factory.mktemp("split")
            write_images(root / "images", count, sizes)
            prepare(folder_source(root / "images"), root / "shards", Options(shards=shards), progress=False)
            made[count, shards, sizes] = ShardIndex.open(root / "shards")
        return made[count, shards, sizes]

    return make


@pytest.fixture(scope="session")
def imagenet_index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The real ImageNet images beside the repository as one split; skips where they are not there."""
    archive = REAL_IMAGES / "imagenet_sample.tar"
    if not archive.is_file():
        pytest.skip("no real images: ../shared/data/imagenet_sample.tar is not there")
    import tarfile

    root = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    options = Options(shards=3, limit=120)
    prepare(folder_source(root / "imagenet_sample"), root / "shards", options, progress=False)
    return ShardIndex.open(root / "shards")
