"""What models see where: the class of every region over the picture, and heat maps of the stages."""

from __future__ import annotations

from collections import Counter
from html import escape

import numpy as np
from PIL import Image

from distill.regions import disagreeing
from pipelines.reporting.drawing import heat
from pipelines.reporting.dump import Dump
from pipelines.reporting.page import Panel, legend, missing, picture, short_tags, strip, thumbnails
from pipelines.reporting.pictures import Pictures, overlay
from pipelines.reporting.regions import RegionPlace, cells, rule_of
from pipelines.reporting.runs import Comparison, RunRecord

MOST_REGIONS, MOST_HEAT, MOST_NAMED = 12, 4, 4


def shares(dump: Dump, rule: str) -> dict[int, float]:
    """Percent of complementary regions at each scale, over the sample."""
    outside = disagreeing(dump["region_classes"], dump.sampled_labels, rule)
    places = cells(dump.facts["scales"])
    scales = [scale for scale in dump.facts["scales"] if scale > 1]
    return {scale: 100 * float(outside[:, [cell.scale == scale for cell in places]].mean()) for scale in scales}


def speaker(run: RunRecord) -> tuple[str, Dump] | None:
    """The model whose regions are shown: the teacher, which the losses go by, or the student itself where it has none."""
    for name, dump in ((f"teacher {run.teacher}", run.teacher_dump), (run.name, run.dump)):
        if dump is not None and "region_classes" in dump:
            return name, dump
    return None


def region_facts(run: RunRecord) -> list[str]:
    """Shares of complementary regions in words."""
    found = speaker(run)
    if found is None:
        absent = [dump.facts["absent"].get("regions") for dump in (run.teacher_dump, run.dump) if dump is not None]
        why = next(filter(None, absent), "there is no dump")
        return [f"Not shown: regions of {run.name}; {why}"]
    name, dump = found
    rule = rule_of(run.recipe["loss"])
    said = ", ".join(f"{share:.1f} % of {scale} x {scale}" for scale, share in shares(dump, rule).items())
    return [f"{run.name}: of {name}'s regions, complementary by the rule `{rule}` are {said or 'none, for there is one scale'}"]


def region_panel(comparison: Comparison, pictures: Pictures) -> Panel:
    """The finest grid over some images, each cell with its class."""
    said, body = [], ""
    for run in comparison.distilled:
        said += region_facts(run)
        found = speaker(run)
        if found is None:
            continue
        name, dump = found
        rule = rule_of(run.recipe["loss"])
        outside = disagreeing(dump["region_classes"], dump.sampled_labels, rule)
        rows = np.searchsorted(dump["sampled_ids"], dump["pictured_ids"])
        # images with both kinds of regions show more than those where all agree
        rows = rows[np.argsort(-np.minimum(outside[rows].sum(1), 4), kind="stable")][:MOST_REGIONS]
        for scale in (scale for scale in dump.facts["scales"] if scale > 1):
            shown = [_regions(dump, int(row), outside[row], scale, pictures) for row in np.sort(rows)]
            body += f"<h3>{escape(run.name)}: {escape(name)}, {scale} x {scale}</h3>{thumbnails(shown)}"
    if body:
        said.append(
            "Blue, solid line: consistent. Orange, dashed line: complementary. Captions: label, class of the whole image,"
            " classes of the regions."
        )
    if pictures.reason and body:
        said.append(f"Not shown: {pictures.reason}")
    return Panel("Regions", body, tuple(said))


def heat_panel(comparison: Comparison, pictures: Pictures) -> Panel:
    """Norms of the stages' maps beside the picture, for teacher and students."""
    there = {name: dump for name, dump in comparison.voices.items() if dump.facts["stages"] and len(dump["pictured_ids"])}
    if not there:
        return missing("Heat maps", ["no dump has stages"])
    first = next(iter(there.values()))
    chosen = first["pictured_ids"][np.linspace(0, len(first["pictured_ids"]) - 1, MOST_HEAT).astype(int)]
    body = ""
    for sample in dict.fromkeys(chosen.tolist()):
        label = first.class_names[first["labels"][first.rows(sample)]]
        row = [pictures.thumbnail(first, sample, label)]
        for name, dump in there.items():
            if sample in dump["pictured_ids"]:
                row.append(_heats(name, dump, int(sample)))
        body += thumbnails(row)
    note = (
        "Norm over channels of each stage's map, first stage to last; then the logit of the class that the model names, cell by"
        " cell of the last map. Each map goes from its own least to its own greatest."
    )
    lacks = [
        f"Not shown: {name}; {dump.facts['absent'].get('stages', 'its dump has no such images')}"
        for name, dump in comparison.voices.items()
        if name not in there
    ]
    return Panel("Heat maps", body, (note, *lacks))


def _regions(dump: Dump, row: int, outside: np.ndarray, scale: int, pictures: Pictures) -> str:
    names, sample = dump.class_names, int(dump["sampled_ids"][row])
    label, whole = names[dump.sampled_labels[row]], names[dump["region_classes"][row, 0]]
    shown = [(cell, place) for place, cell in enumerate(cells(dump.facts["scales"])) if cell.scale == scale]
    found = [int(dump["region_classes"][row, place]) for _, place in shown]
    classes = [k for k, _ in Counter(found).most_common()]
    tags = short_tags([names[k] for k in classes], 3)
    tag_of = dict(zip(classes, tags, strict=True))
    shapes = [_cell(cell, names[k], tag_of[k], outside[place]) for (cell, place), k in zip(shown, found, strict=True)]
    said = "; ".join(filter(None, [f"{label}: {whole}", legend([names[k] for k in classes], tags, MOST_NAMED)]))
    alt = f"{sum(int(outside[place]) for _, place in shown)} complementary regions"
    return pictures.thumbnail(dump, sample, said, wide=True, over=overlay(shapes, alt))


def _cell(cell: RegionPlace, name: str, tag: str, outside: bool) -> str:
    """One region: its frame and its class's tag, the name where a pointer rests on it. Colour is not the only sign: the line is
    dashed too."""
    side, width = 100 / cell.scale, 3.2 / cell.scale**0.5
    colour, dash = ("#e69f00", " stroke-dasharray='4 2'") if outside else ("#56b4e9", "")
    x, y, inner, size = cell.column * side, cell.row * side, side - 2 * width, side / 3
    frame = f"x='{x + width:g}' y='{y + width:g}' width='{inner:g}' height='{inner:g}' fill='none'"
    text = f"x='{x + 2.2 * width:g}' y='{y + 1.2 * width + size:g}' font-size='{size:g}' fill='{colour}'"
    return (
        f"<g><title>{escape(name)}</title><rect {frame} stroke='{colour}' stroke-width='{width / 1.7:g}'{dash}/>"
        f"<text {text} stroke='#000' stroke-width='{size / 7:g}' paint-order='stroke'>{escape(tag)}</text></g>"
    )


def _heats(name: str, dump: Dump, sample: int) -> str:
    """The maps of one image, each with a text of its own for those who cannot see it."""
    row = int(np.searchsorted(dump["pictured_ids"], sample))
    maps = {f"stage {stage}": f"heat{stage}" for stage in range(-dump.facts["stages"], 0)}
    caption = f"{name}: stages"
    if "activation" in dump:
        named = dump.class_names[dump.predicted[dump.rows(sample)]]
        maps[f"activation of {named}"] = "activation"
        caption += f", activation of {named}"
    pictures = [picture(Image.fromarray(heat(dump[array][row])), f"{name}, {what}") for what, array in maps.items()]
    return strip(pictures, caption)
