"""Pictures of a split's images, read from the shards by their row in the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageFile

from distill.data.index import ShardIndex
from distill.data.pixels import decode
from distill.data.reader import BadSample
from distill.data.reference import read_sample
from distill.data.store import ShardLost
from pipelines.reporting.page import picture, thumbnail
from pipelines.reporting.runs import Comparison


@dataclass(frozen=True)
class Pictures:
    """The images of one split; `reason` says why there are none."""

    index: ShardIndex | None
    reason: str = ""

    @classmethod
    def of(cls, comparison: Comparison) -> Pictures:
        """The validation images: where they were asked for, else where the dumps and the runs found them."""
        digests = [dump.facts["split_digest"] for dump in comparison.voices.values()]
        digests += [run.manifest.get("val_shards") for run in comparison.distilled]
        dumped = [dump.facts["split"] for dump in comparison.voices.values()]
        places = [comparison.split, *dumped, *(run.recipe["data"]["val"] for run in comparison.distilled)]
        reason = "no place is known"
        for place in filter(None, places):
            try:
                index = ShardIndex.open(place)
            except ValueError as error:
                reason = str(error)
                continue
            if digests and index.digest != digests[0]:
                reason = f"{place} holds other images than the run was evaluated on"
                continue
            return cls(index)
        return cls(None, f"no pictures, for the validation shards cannot be read ({reason}); give their folder as --val")

    def read(self, sample: int) -> Image.Image | None:
        """The image of a row; None where it cannot be had."""
        if self.index is None:
            return None
        try:
            return decode(read_sample(self.index, sample))
        except (BadSample, ShardLost, KeyError):
            return None

    def thumbnail(self, sample: int, caption: str, wide: bool = False, over: str = "") -> str:
        """An image with its caption; a grey square where it cannot be had. over: an <svg> that lies on it."""
        return shown(self.read(sample), caption, wide, over)


def shown(image: Image.Image | None, caption: str, wide: bool = False, over: str = "") -> str:
    """An image with its caption; a grey square where there is none. over: an <svg> that lies on it."""
    nothing = "<div class=nothing role=img aria-label='no picture'></div>"
    content = nothing if image is None else picture(square(image), caption)
    return thumbnail(f"<div class=over>{content}{over}</div>" if over else content, caption, wide)


def remains(index: ShardIndex, sample: int) -> Image.Image | None:
    """The image of a damaged sample, as far as its bytes can be decoded; None where nothing can."""
    offset, shard, size, *_ = index.records[sample].item()
    strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        with index.shard_path(shard).open("rb") as file:
            file.seek(offset)
            return decode(file.read(size))
    except (OSError, BadSample):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict


def square(image: Image.Image) -> Image.Image:
    """The largest square in the middle, which is what models are shown, but for a margin."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def overlay(shapes: Sequence[str], alt: str) -> str:
    """Shapes over a picture whose sides are 100."""
    return f"<svg viewBox='0 0 100 100' role=img aria-label='{escape(alt, quote=True)}'>{''.join(shapes)}</svg>"
