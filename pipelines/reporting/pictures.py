"""Pictures of a split's images, read from the shards by their row in the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image, ImageFile

from distill.data.index import ShardIndex
from distill.data.pixels import decode
from distill.data.reader import BadSample
from distill.data.reference import read_sample
from distill.data.store import ShardLost
from pipelines.reporting.dump import Dump
from pipelines.reporting.page import picture, thumbnail
from pipelines.reporting.runs import Comparison


@dataclass(frozen=True)
class Pictures:
    """The images of the splits that dumps describe; `reason` says why some are missing."""

    indexes: Mapping[str, ShardIndex]
    """By their digest, as a dump names its split."""
    reason: str = ""

    @classmethod
    def of(cls, comparison: Comparison) -> Pictures:
        """The validation images: where they were asked for, else where the dumps and the runs found them."""
        dumps = [dump for run in comparison.distilled for dump in (run.dump, run.teacher_dump) if dump is not None]
        wanted = {dump.facts["split_digest"] for dump in dumps}
        places = [comparison.split, *(dump.facts["split"] for dump in dumps)]
        places += [run.recipe["data"]["val"] for run in comparison.distilled]
        found, why = dict[str, ShardIndex](), "no place is known"
        for place in dict.fromkeys(map(str, filter(None, places))):
            try:
                index = ShardIndex.open(place)
            except ValueError as error:
                why = str(error)
                continue
            if index.digest in wanted:
                found.setdefault(index.digest, index)
            else:
                why = f"{place} holds other images than the run was evaluated on"
        if wanted <= found.keys():
            return cls(found)
        how_many = "some" if found else "no"
        return cls(found, f"{how_many} pictures, for the validation shards cannot be read ({why}); give their folder as --val")

    def read(self, dump: Dump, sample: int) -> Image.Image | None:
        """The image of a row of the dump's split; None where it cannot be had."""
        index = self.indexes.get(dump.facts["split_digest"])
        if index is None:
            return None
        try:
            return decode(read_sample(index, sample))
        except (BadSample, ShardLost, KeyError):
            return None

    def thumbnail(self, dump: Dump, sample: int, caption: str, wide: bool = False, over: str = "") -> str:
        """An image with its caption; a grey square where it cannot be had. over: an <svg> that lies on it."""
        return shown(self.read(dump, sample), caption, wide, over)


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
