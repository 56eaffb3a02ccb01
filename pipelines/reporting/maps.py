"""Representations of teacher and students: a map of embeddings, class-mean logits, correlations of logits, CKA by stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np

from pipelines.reporting.drawing import grouped, matrix, scatter
from pipelines.reporting.dump import Array, Dump, joined_samples
from pipelines.reporting.geometry import (
    absolute_difference,
    class_mean_logits,
    embedding_map,
    linear_cka,
    logit_correlations,
    shown_classes,
)
from pipelines.reporting.page import Panel, grid, legend, missing, short_tags
from pipelines.reporting.runs import Comparison

MOST_CLASSES, MOST_POINTS = 20, 50
"""Classes of a map of embeddings, and images of each."""
MATRICES: dict[str, tuple[Callable[[Dump], Array], str]] = {
    "Class-mean logits": (class_mean_logits, "|difference| of class-mean logits from the teacher's"),
    "Correlation of logits": (logit_correlations, "|difference| of the logits' correlations from the teacher's"),
}


def pairs(comparison: Comparison) -> dict[str, tuple[Dump, Dump]]:
    """Teacher and student of everyone who can be held against a teacher, by the student's name; the baseline too."""
    found = {}
    for run in comparison.distilled:
        teacher = run.teacher_dump
        if teacher is None or run.teacher is None:
            continue
        for each in (comparison.baseline_of(run), run):
            if each is not None and each.name in comparison.voices and teacher.has_split_of(comparison.voices[each.name]):
                found[each.name] = (teacher, comparison.voices[each.name])
    return found


def stage_similarities(teacher: Dump, student: Dump) -> list[float]:
    """CKA of the stages that both have, counted from the end, the earliest first; on the images of both samples."""
    his, ours = joined_samples(teacher, student)
    count = min(teacher.facts["stages"], student.facts["stages"])
    return [linear_cka(teacher[f"stage{-i}"][his], student[f"stage{-i}"][ours]) for i in range(count, 0, -1)]


def similarity_facts(comparison: Comparison) -> list[str]:
    """CKA in words."""
    said = []
    for name, (teacher, student) in pairs(comparison).items():
        found = stage_similarities(teacher, student)
        if found:
            said.append(f"{name}: CKA with the teacher {', '.join(f'{value:.3f}' for value in found)}, first stage to last")
        else:
            why = next(filter(None, (dump.facts["absent"].get("stages") for dump in (student, teacher))), "there are no stages")
            said.append(f"Not shown: CKA of {name} with the teacher; {why}")
    return said


def similarity_panel(comparison: Comparison) -> Panel:
    """CKA of each stage."""
    found = {name: stage_similarities(*both) for name, both in pairs(comparison).items()}
    depth = max(map(len, found.values()), default=0)
    if not depth:
        return missing("Similarity by stage", ["it needs the dumps of a teacher and a student, both with stages"])
    stages = [f"stage {-i}" for i in range(depth, 0, -1)]
    padded = {name: [np.nan] * (depth - len(values)) + values for name, values in found.items()}
    note = "Linear CKA of the maps' means over places, on the dump's sample; stages are counted from the end."
    figure = grouped(padded, stages, "CKA", "Linear CKA with the teacher, stage by stage")
    return Panel("Similarity by stage", grid([figure]), (note, *similarity_facts(comparison)))


def differences(comparison: Comparison, make: Callable[[Dump], Array]) -> dict[str, Array]:
    """|student - teacher| of a matrix of every student that has a teacher."""
    return {
        name: absolute_difference(make(teacher), make(student))
        for name, (teacher, student) in pairs(comparison).items()
        if "class_logit_sums" in teacher and "class_logit_sums" in student
    }


def matrix_facts(comparison: Comparison) -> list[str]:
    """Mean and maximum of each difference."""
    said = []
    for title, (make, _) in MATRICES.items():
        for name, values in differences(comparison, make).items():
            apart = values[~np.eye(len(values), dtype=bool)]
            if np.isnan(apart).all():
                said.append(f"{title}, {name}: no number, for no two classes can be compared")
                continue
            empty = f"; {int(np.isnan(values).all(1).sum())} classes have no number" if np.isnan(values).all(1).any() else ""
            said.append(f"{title}, {name}: mean {np.nanmean(apart):.4f}, maximum {np.nanmax(apart):.4f}{empty}")
    return said


def matrix_panel(comparison: Comparison) -> Panel:
    """Differences from the teacher, on one scale for all students."""
    body = ""
    for title, (make, what) in MATRICES.items():
        found = {name: values for name, values in differences(comparison, make).items() if not np.isnan(values).all()}
        limit = max((float(np.nanmax(values)) for values in found.values()), default=0.0)
        figures = [
            matrix(values, limit or 1.0, comparison.voices[name].class_names, f"{name}: {what}; 0 to {limit:.3g} for all")
            for name, values in found.items()
        ]
        body += f"<h3>{title}</h3>{grid(figures)}" if figures else ""
    if not body:
        return missing("Logits of the classes", ["it needs the dumps of a teacher and of a student, of not too many classes"])
    note = "The diagonal is set to 0. The scale is the greatest difference of all students, not one that was chosen."
    return Panel("Logits of the classes", body, (note, *matrix_facts(comparison)))


def embedding_panel(comparison: Comparison) -> Panel:
    """t-SNE of the same classes for teacher, student alone and distilled student."""
    there = {
        name: dump for name, dump in comparison.voices.items() if "embeddings" in dump and np.isfinite(dump["embeddings"]).all()
    }
    lacks = [
        f"Not shown: {name}; {dump.facts['absent'].get('embedding', 'its embeddings are not all finite')}"
        for name, dump in comparison.voices.items()
        if name not in there
    ]
    if not there:
        return missing("Map of embeddings", ["no dump has embeddings"])
    common = reduce(np.intersect1d, (dump["sampled_ids"] for dump in there.values()))
    if len(common) <= 3:
        return missing("Map of embeddings", [f"the samples of the dumps share {len(common)} images, and it needs 4"])
    first = next(iter(there.values()))
    labels = first["labels"][first.rows(common)]
    classes = shown_classes(labels, MOST_CLASSES)
    rows = np.sort(np.concatenate([np.flatnonzero(labels == k)[:MOST_POINTS] for k in classes]))
    names = [first.class_names[k] for k in classes]
    tags = short_tags(names, 8)
    marks = dict(zip(classes.tolist(), tags, strict=True))
    figures = []
    for name, dump in there.items():
        embeddings = dump["embeddings"][np.searchsorted(dump["sampled_ids"], common[rows])]
        figures.append(scatter(embedding_map(embeddings), labels[rows], marks, f"Embeddings of {name}"))
    note = (
        f"t-SNE (after PCA to 50, one seed) of {len(rows):,} images of {len(classes)} classes, the same for every model."
        " Groups mean something; sizes of groups and distances between them mean nothing."
    )
    said = legend(names, tags, MOST_CLASSES)
    return Panel("Map of embeddings", grid(figures), (note, *([f"Classes: {said}"] if said else []), *lacks))
