"""Calibration of every model, and how far each student agrees with its teacher."""

from __future__ import annotations

import numpy as np

from pipelines.reporting.calibration import Reliability, divergence, reliability
from pipelines.reporting.drawing import reliabilities
from pipelines.reporting.dump import Dump, joined, joined_samples
from pipelines.reporting.page import Panel, grid, missing
from pipelines.reporting.runs import Comparison


def calibrations(comparison: Comparison) -> dict[str, Reliability]:
    """The reliability of everyone with a dump."""
    return {
        name: reliability(dump.confidence, dump.predicted == dump["labels"])
        for name, dump in comparison.voices.items()
        if len(dump["labels"])
    }


def agreement(student: Dump, teacher: Dump) -> tuple[float, float | None]:
    """Percent of images for which both name one class, and the mean KL divergence from the teacher over the sample."""
    mine, theirs = joined(student, teacher)
    same = 100 * float((student.predicted[mine] == teacher.predicted[theirs]).mean())
    ours, his = joined_samples(student, teacher)
    return same, divergence(teacher["logits"][his], student["logits"][ours]) if len(ours) else None


def doubtful_labels(student: Dump, teacher: Dump) -> np.ndarray:
    """Rows of the student's dump whose image both name alike and against its label, the surest first."""
    mine, theirs = joined(student, teacher)
    named = student.predicted[mine]
    against = (named == teacher.predicted[theirs]) & (named != student["labels"][mine])
    sure = (student.confidence[mine] * teacher.confidence[theirs])[against]
    return mine[against][np.argsort(-sure, kind="stable")]


def facts(comparison: Comparison) -> list[str]:
    """Calibration error and agreement in words."""
    said = [f"{name}: expected calibration error {each.error:.2f} %" for name, each in calibrations(comparison).items()]
    for run in comparison.distilled:
        if run.dump is None or run.teacher is None:
            continue
        if run.pair is None:
            said.append(f"Not shown: how far {run.name} agrees with its teacher, of which there is no dump of these images")
            continue
        same, apart = agreement(*run.pair)
        kl = "" if apart is None else f"; KL from the teacher {apart:.4f} nats on the sample"
        said.append(f"{run.name} names the teacher's class for {same:.2f} % of the images{kl}")
    return said


def panel(comparison: Comparison) -> Panel:
    """Reliability curves."""
    found = calibrations(comparison)
    if not found:
        return missing("Calibration", ["no model has a dump"])
    return Panel("Calibration", grid([reliabilities(found, "Share right over confidence")]), tuple(facts(comparison)))
