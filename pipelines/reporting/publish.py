"""The report that a run writes at its end: the page, its figures for the trackers, the verdict for the student's model card."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from timm.models import get_pretrained_cfg

from distill.data.index import ShardIndex
from distill.files import write_atomically, written_aside
from distill.models.card import CARD, TAGS, with_section
from distill.recipe import Recipe
from pipelines.reporting import verdict
from pipelines.reporting.curves import title_of_curve
from pipelines.reporting.drawing import rasterised
from pipelines.reporting.dump import Array
from pipelines.reporting.evaluations import write_dumps
from pipelines.reporting.first_batch import FirstBatch
from pipelines.reporting.page import in_markdown
from pipelines.reporting.report import write
from pipelines.reporting.runs import STUDENT_DUMP, Comparison

PAGE, CURVE = "report.html", "curve.png"
SECONDS = 40.0
"""The longest that the dumps of both models may take; drawing takes 5 to 15 seconds more."""
ONE_IMAGE = ("aim", "clearml")
"""Trackers that take one image under a name; the others take several."""


def publish(folder: Path, trackers: Sequence[Any], say: Callable[[str], None]) -> None:
    """Writes the report of the finished run in `folder`. What goes wrong is said in one line, and the run stays finished."""
    try:
        if find_spec("matplotlib") is None:
            raise RuntimeError("matplotlib is not installed; `pip install matplotlib`")
        (folder / STUDENT_DUMP).unlink(missing_ok=True)  # of a student that has learned on since then
        problems = write_dumps(Comparison.read([folder]), SECONDS)
        comparison = Comparison.read([folder])
        with rasterised() as figures:
            write(comparison, folder / PAGE)
        batch = FirstBatch.read(folder)
        sheets = {} if batch is None else {"Augmented batch": sheet(batch.images)}
        show(trackers, {**figures, **sheets}, comparison.runs[0].last_step)
        add_verdict(folder / "student", comparison, figures)
        for line in problems:
            say(line)
        say(f"{folder / PAGE}: what the student learned")
    except Exception as error:  # drawing, trackers and evaluations raise whatever they like
        why = next(filter(str.strip, str(error).splitlines()), type(error).__name__)
        say(f"{folder}: no report: {why}; `python pipelines/report.py {shlex.quote(str(folder))}` draws it")


def sheet(images: Array, columns: int = 6) -> Array:
    """Images [N, H, W, 3] in rows of one picture; what is left of the last row is black."""
    missing = -len(images) % columns
    rows = np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))).reshape(-1, columns, *images.shape[1:])
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows])


def show(trackers: Sequence[Any], figures: Mapping[str, Array], step: int) -> None:
    """Gives figures, uint8 [H, W, 3] by title, to every tracker that takes images."""
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            one = tracker.name in ONE_IMAGE
            images = {f"report/{title}": figure if one else figure[None] for title, figure in figures.items()}
            tracker.log_images(images, step=step, **({"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}))


def add_verdict(student: Path, comparison: Comparison, figures: Mapping[str, Array]) -> None:
    """Writes the verdict in words and the curve of top-1 into the model card of the exported student."""
    lines = [f"- {in_markdown(line)}" for line in verdict.facts(comparison)]
    curve = figures.get(title_of_curve(comparison.runs[0]))
    if curve is not None:
        with written_aside(student / CURVE) as aside:
            Image.fromarray(curve).save(aside, "PNG")
        lines += ["", f"![Top-1 over training]({CURVE})"]
    write_atomically(student / CARD, str(with_section(ModelCard.load(student / CARD), "What it learned", lines)))


def card_fields(recipe: Recipe, summary: Mapping[str, Any], val: ShardIndex) -> dict[str, Any]:
    """What the hub reads of a card: the evaluation with its data, and the published models that the student comes from."""
    split = val.folder.resolve()
    data: dict[str, Any] = {"dataset_type": split.parent.name, "dataset_name": split.parent.name, "dataset_split": split.name}
    data["dataset_args"] = {"images": val.num_samples, "index_sha256": val.digest}
    results = [
        EvalResult("image-classification", metric_type="accuracy", metric_name=f"{name} (%)", metric_value=summary[key], **data)
        for name, key in (("top-1", "top1"), ("top-5", "top5"))
    ]
    started = [(recipe.teacher.name, recipe.teacher.weights), (recipe.student.name, recipe.student.initial_weights)]
    published = [hub_name(name) for name, weights in started if weights == "pretrained" and name != "none"]
    fields: dict[str, Any] = {"eval_results": results}
    if recipe.teacher.name != "none":
        fields["tags"] = [*TAGS, "knowledge-distillation"]
    if models := list(dict.fromkeys(filter(None, published))):
        fields["base_model"] = models
    return fields


def hub_name(name: str) -> str | None:
    """The repository on the hub of a model that timm loads by this name; None where timm has none."""
    source, colon, repository = name.partition(":")
    if colon:
        return repository if source in ("hf-hub", "hf_hub") else None
    config = get_pretrained_cfg(name, allow_unregistered=True)
    return None if config is None else config.hf_hub_id
