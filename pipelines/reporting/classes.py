"""Classes that gained and lost, pairs that are confused, and the images that one model wins and the other loses."""

from __future__ import annotations

from html import escape

import numpy as np

from pipelines.reporting.accuracy import Confusion, class_accuracies, confused_pairs, flips_between
from pipelines.reporting.drawing import changes
from pipelines.reporting.dump import Array, Dump, joined
from pipelines.reporting.page import Panel, grid, missing, thumbnails
from pipelines.reporting.pictures import Pictures
from pipelines.reporting.runs import Comparison, RunRecord

MOST_CHANGED, MOST_CONFUSED, MOST_FLIPPED = 20, 15, 24


def changed_classes(run: Dump, baseline: Dump) -> tuple[Array, Array]:
    """Points of top-1 that each class gained against the baseline, NaN where it has no image; and those classes, the greatest
    gain first."""
    mine, theirs = joined(run, baseline)
    labels, classes = run["labels"][mine], len(run.class_names)
    before = class_accuracies(labels, baseline.predicted[theirs], classes)
    gained = class_accuracies(labels, run.predicted[mine], classes) - before
    there = np.flatnonzero(~np.isnan(gained))
    return gained, there[np.argsort(-gained[there], kind="stable")]


def class_facts(comparison: Comparison, run: RunRecord) -> list[str]:
    """Gains, losses and confusions in words."""
    if run.dump is None:
        return [f"Not shown: classes of {run.name}, whose dump is missing"]
    dump, names = run.dump, run.dump.class_names
    absent = sorted(set(range(len(names))) - set(dump["labels"].tolist()))
    said = []
    if absent:
        listed = ", ".join(names[k] for k in absent[:10]) + (", ..." if len(absent) > 10 else "")
        said.append(f"{len(absent)} of {len(names)} classes have no image in this split and no number: {listed}")
    baseline, both = comparison.baseline_of(run), comparison.against_baseline(run)
    if baseline is None or both is None:
        if baseline is None:
            why = "no run of the student alone was given"
        else:
            why = f"the dump of {baseline.name} is {'missing' if baseline.dump is None else 'of other images'}"
        said.append(f"Not shown: what {run.name} gained and lost by class; {why}")
    else:
        gained, order = changed_classes(*both[1:])
        better, worse = int((gained[order] > 0).sum()), int((gained[order] < 0).sum())
        most, least = (f"{names[k]} {gained[k]:+.1f}" for k in (order[0], order[-1]))
        said.append(
            f"{run.name} against {baseline.name}: {better} classes gained, {worse} lost; most {most}, least {least} points"
        )
    pairs = confusions(dump)
    if pairs:
        first = pairs[0]
        said.append(
            f"{run.name} confuses most often {names[first.label]} with {names[first.predicted]}:"
            f" {first.images} of its images, {first.share:.0%}"
        )
    return said


def confusions(dump: Dump) -> list[Confusion]:
    """The most confused pairs of a dump."""
    return confused_pairs(dump["labels"], dump.predicted, len(dump.class_names), MOST_CONFUSED)


def panel(comparison: Comparison, pictures: Pictures) -> Panel:
    """Bars of the most changed classes, and a thumbnail for each confused pair."""
    said, body = [], ""
    for run in comparison.distilled:
        said += class_facts(comparison, run)
        if run.dump is None:
            continue
        both = comparison.against_baseline(run)
        figures = [] if both is None else _changes(*both[1:], run.name)
        body += f"<h3>{escape(run.name)}</h3>{grid(figures)}"
        pairs = confusions(run.dump)
        if pairs:
            body += "<h3>Most confused pairs</h3>" + thumbnails([_pair(run.dump, pair, pictures) for pair in pairs])
    if pictures.reason and body:
        said.append(f"Not shown: {pictures.reason}")
    return Panel("Classes", body, tuple(said)) if body else missing("Classes", _reasons(said))


def flip_facts(comparison: Comparison, run: RunRecord) -> list[str]:
    """How many images changed sides."""
    both = comparison.against_baseline(run)
    if both is None:
        return [f"Not shown: {run.name}'s images right now and wrong alone; this needs dumps of both, of the same images"]
    baseline, dump, alone = both
    mine, _, found = flips_between(dump, alone)
    return [
        f"{run.name} is right about {len(found.gained)} images that {baseline.name} is wrong about, and wrong about"
        f" {len(found.lost)} that it is right about, of {len(mine):,}"
    ]


def flip_panel(comparison: Comparison, pictures: Pictures) -> Panel:
    """Images that changed sides, with what everybody says of them."""
    said, body = [], ""
    for run in comparison.distilled:
        said += flip_facts(comparison, run)
        both = comparison.against_baseline(run)
        if both is None:
            continue
        _, dump, alone = both
        mine, theirs, found = flips_between(dump, alone)
        for title, rows in (("Right now, wrong alone", found.gained), ("Wrong now, right alone", found.lost)):
            shown = rows[np.linspace(0, len(rows) - 1, min(MOST_FLIPPED, len(rows))).astype(int)]
            cells = [_flip(run, dump, alone, int(mine[row]), int(theirs[row]), pictures) for row in shown]
            none = "<p class=missing>No image.</p>"
            body += f"<h3>{escape(run.name)}: {title} ({len(rows)})</h3>{thumbnails(cells) if cells else none}"
    return Panel("Flips", body, tuple(said)) if body else missing("Flips", _reasons(said))


def _reasons(said: list[str]) -> list[str]:
    return [line.removeprefix("Not shown: ") for line in said]


def _changes(dump: Dump, baseline: Dump, name: str) -> list[str]:
    gained, order = changed_classes(dump, baseline)
    few = len(order) <= 2 * MOST_CHANGED
    parts = (
        {"All classes": order}
        if few
        else {"What gained most": order[:MOST_CHANGED], "What gained least or lost": order[::-1][:MOST_CHANGED]}
    )
    return [
        changes({dump.class_names[k]: float(gained[k]) for k in chosen}, "points of top-1", f"{title}, {name} less alone")
        for title, chosen in parts.items()
    ]


def _pair(dump: Dump, pair: Confusion, pictures: Pictures) -> str:
    names = dump.class_names
    caption = f"{names[pair.label]} taken for {names[pair.predicted]}: {pair.images} ({pair.share:.0%})"
    return pictures.thumbnail(dump, int(dump["sample_ids"][pair.example]), caption)


def _flip(run: RunRecord, dump: Dump, alone: Dump, row: int, other: int, pictures: Pictures) -> str:
    names, sample = dump.class_names, int(dump["sample_ids"][row])
    said = [f"label {names[dump['labels'][row]]}", f"now {names[dump.predicted[row]]}"]
    said.append(f"alone {names[alone.predicted[other]]}")
    if run.pair is not None:
        teacher = run.pair[1]
        place = np.flatnonzero(teacher["sample_ids"] == sample)
        said += [f"teacher {names[teacher.predicted[place[0]]]}"] if len(place) else []
    # four long names below a narrow picture would be a column of single words
    return pictures.thumbnail(dump, sample, ", ".join(said), wide=max(map(len, names)) > 6)
