"""The training data as the models met them: views of the first batch, samples that were bad, labels that are doubtful."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from distill.config import as_dict
from distill.data.index import ShardIndex
from distill.recipe import Recipe
from pipelines.reporting.confidence import doubtful_labels
from pipelines.reporting.first_batch import FILE, FirstBatch
from pipelines.reporting.page import Panel, thumbnails
from pipelines.reporting.pictures import Pictures, remains, shown
from pipelines.reporting.runs import Comparison, RunRecord, lines_of

MOST_DOUBTFUL, MOST_BAD = 12, 12


def batch_panel(comparison: Comparison) -> Panel:
    """The first training batch of each run, image by image."""
    said, body = [], ""
    for run in comparison.distilled:
        batch = FirstBatch.read(run.folder)
        if batch is None:
            said.append(
                f"Not shown: a batch of {run.name}; {run.folder / FILE}, which a run writes in its first step, is missing"
            )
            continue
        said.append(f"{run.name}: {len(batch.images)} images of the first batch as both models see them; {_augmentation(run)}")
        cells = [shown(Image.fromarray(image), name) for image, name in zip(batch.images, batch.labels, strict=True)]
        body += f"<h3>{escape(run.name)}</h3>{thumbnails(cells)}"
    return Panel("Augmented batch", body, tuple(said))


def _augmentation(run: RunRecord) -> str:
    """What the recipe's section `augment` says that is no default."""
    usual = as_dict(Recipe())["augment"]
    said = [f"{key} {value}" for key, value in run.recipe["augment"].items() if value != usual.get(key)]
    return f"augmentation: {', '.join(said) or 'the default'}"


def data_panel(comparison: Comparison, pictures: Pictures) -> Panel:
    """Labels that teacher and student both speak against, and samples that were bad."""
    said, body = [], ""
    for run in comparison.distilled:
        bad = bad_samples(run)
        said.append(f"{run.name}: {len(bad)} samples turned out bad while it ran")
        body += thumbnails(_bad(run, bad[:MOST_BAD])) if bad else ""
        if run.pair is None:
            said.append(f"Not shown: doubtful labels of {run.name}; this needs the dumps of student and teacher")
            continue
        dump = run.pair[0]
        rows, names = doubtful_labels(*run.pair), dump.class_names
        images = len(dump["labels"])
        said.append(f"{run.name} and its teacher name one class against the label for {len(rows)} of {images:,} images")
        cells = []
        for row in rows[:MOST_DOUBTFUL]:
            caption = f"label {names[dump['labels'][row]]}, both say {names[dump.predicted[row]]}"
            cells.append(pictures.thumbnail(dump, int(dump["sample_ids"][row]), caption))
        body += thumbnails(cells)
    return Panel("Doubtful labels and bad samples", body, tuple(said))


def bad_samples(run: RunRecord) -> list[dict[str, Any]]:
    """The lines of the run's files of faults, each sample once: processes and resumed runs report one again."""
    lines = [line for path in sorted(run.folder.glob("faults-rank*.jsonl")) for line in lines_of(path)]
    return list({(line["shard"], line["sample"]): line for line in reversed(lines)}.values())[::-1]


def _bad(run: RunRecord, lines: list[dict[str, Any]]) -> list[str]:
    indexes = [index for split in ("train", "val") if (index := _index(Path(run.recipe["data"][split])))]
    return [shown(_remains(line, indexes), f"{line['key']}: {line['reason']}", wide=True) for line in lines]


def _index(folder: Path) -> ShardIndex | None:
    try:
        return ShardIndex.load(folder)
    except ValueError:
        return None


def _remains(line: dict[str, Any], indexes: list[ShardIndex]) -> Image.Image | None:
    """The picture of a fault, as far as it decodes; of the split that has this sample at this place."""
    for index in indexes:
        if line["sample"] < index.num_samples:
            record = index.records[line["sample"]]
            if (index.shards[record["shard"]].name, int(record["offset"])) == (line["shard"], line["offset"]):
                return remains(index, line["sample"])
    return None
