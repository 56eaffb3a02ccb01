"""Runs as their folders tell them: what was asked, what came of it, and who is whose teacher and baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.files import RUN_EVENTS, RUN_MANIFEST, RUN_METRICS, RUN_SUMMARY
from pipelines.reporting.dump import Dump

STUDENT_DUMP, TEACHER_DUMP = "student.npz", "teacher.npz"
SUMMARY = ("top1", "best_top1", "seconds", "images_per_second")
"""Numbers of a finished run that are read."""
OWN_KEYS = ("seed", "out")
"""Recipe keys by which two runs of one experiment differ."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """What a run's folder holds. A run that was stopped early has no summary."""

    folder: Path
    name: str
    """What the report calls it: the folder's name, or more of its path where two have one name."""
    manifest: dict[str, Any]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    dump: Dump | None
    """What its student says of each image."""
    teacher_dump: Dump | None

    @classmethod
    def read(cls, folder: Path, name: str = "") -> RunRecord:
        """The run in a folder, called `name` or as its folder. Raises ValueError for a folder without one."""
        manifest = folder / RUN_MANIFEST
        if not manifest.is_file():
            raise ValueError(f"{folder}: no {RUN_MANIFEST}, so no run began here; give the --out of a run")
        said = _object(manifest, ("recipe",))
        summary = folder / RUN_SUMMARY
        weights = Path(_teacher_weights(folder, said["recipe"]))
        # the teacher's own run lies beside its weights: RUN/student holds them, RUN/student.npz what they say
        beside = [weights.parent / STUDENT_DUMP] if weights.parent != Path() else []  # `pretrained` lies nowhere
        return cls(
            folder,
            name or folder.resolve().name,
            said,
            _object(summary, SUMMARY) if summary.is_file() else None,
            lines_of(folder / RUN_METRICS),
            lines_of(folder / RUN_EVENTS),
            _dump(folder / STUDENT_DUMP),
            _dump(folder / TEACHER_DUMP, *beside),
        )

    @property
    def recipe(self) -> dict[str, Any]:
        """The whole recipe."""
        found: dict[str, Any] = self.manifest["recipe"]
        return found

    @property
    def pair(self) -> tuple[Dump, Dump] | None:
        """The dumps of student and teacher; None where one is missing, or they are of two splits."""
        ours, theirs = self.dump, self.teacher_dump
        if self.teacher is None or ours is None or theirs is None or not ours.has_split_of(theirs):
            return None
        return ours, theirs

    @property
    def student(self) -> str:
        """timm's name."""
        return str(self.recipe["student"]["name"])

    @property
    def teacher(self) -> str | None:
        """timm's name; None for a student that learns alone."""
        name = self.recipe["teacher"]["name"]
        return None if name == "none" else str(name)

    @property
    def imports(self) -> list[str]:
        """The words of the run's command that import files of the user's own."""
        words = [part for word in self.manifest["command"] for part in word.split("=", 1)]
        return [word for i, each in enumerate(words) if each == "--import" for word in words[i : i + 2]]

    @property
    def method(self) -> str:
        """The losses by name."""
        return " + ".join(self.recipe["loss"])

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of the log that hold an evaluation."""
        return [line for line in self.metrics if "eval/top1" in line]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of the log that hold a training step."""
        return [line for line in self.metrics if "loss/total" in line]

    @property
    def top1(self) -> float | None:
        """Percent: of the exported student; of the last evaluation where the run did not end; None before the first."""
        if self.summary is not None:
            return float(self.summary["top1"])
        return float(self.evaluations[-1]["eval/top1"]) if self.evaluations else None

    @property
    def best_top1(self) -> float | None:
        """Percent: the best evaluation."""
        return max((float(line["eval/top1"]) for line in self.evaluations), default=self.top1)

    @property
    def teacher_top1(self) -> float | None:
        """Percent, of the teacher on the same images; None where nobody evaluated it."""
        if self.summary is not None and self.summary.get("teacher_top1") is not None:
            return float(self.summary["teacher_top1"])
        return None if self.teacher_dump is None or self.teacher is None else float(self.teacher_dump.facts["top1"])

    @property
    def last_step(self) -> int:
        """The last step of the log."""
        return max((int(line["step"]) for line in self.metrics), default=0)

    @property
    def state(self) -> str:
        """`finished`, or how far it came."""
        if self.summary is not None:
            return "finished"
        planned = self.recipe["train"]["epochs"] * math.floor(
            self.manifest["train_samples"] / self.recipe["train"]["global_batch_size"]
        )
        return f"at step {self.last_step:,} of {planned:,}, not finished"

    @property
    def experiment(self) -> str:
        """What it has in common with the same recipe at other seeds."""
        return json.dumps({key: value for key, value in self.recipe.items() if key not in OWN_KEYS}, sort_keys=True)


@dataclass(frozen=True)
class Comparison:
    """The runs that one report is about."""

    runs: tuple[RunRecord, ...]
    published: float | None = None
    """The top-1 that the paper has for this pair and method, in percent."""
    split: Path | None = None
    """Where the validation shards lie, if not where the dumps found them."""

    @classmethod
    def read(cls, folders: Sequence[Path], published: float | None = None, split: Path | None = None) -> Comparison:
        """The runs in these folders. Raises ValueError where one holds none."""
        once = list(dict.fromkeys(folder.resolve() for folder in folders))
        longest = max(len(place.parts) for place in once)
        # the shortest ends of their paths that tell them apart: methods/a/seed0 and methods/b/seed0 are a/seed0 and b/seed0
        ends = ([str(Path(*place.parts[-depth:])) for place in once] for depth in range(1, longest + 1))
        names = dict(zip(once, next(each for each in ends if len(set(each)) == len(once)), strict=True))
        asked = {folder.resolve(): folder for folder in reversed(folders)}
        return cls(tuple(RunRecord.read(asked[place], names[place]) for place in once), published, split)

    @property
    def distilled(self) -> tuple[RunRecord, ...]:
        """The runs that the report is about: those with a teacher; all, where none has one."""
        return tuple(run for run in self.runs if run.teacher is not None) or self.runs

    def baseline_of(self, run: RunRecord) -> RunRecord | None:
        """The same student, trained alone on the same validation images, among the runs."""
        alone = (
            other
            for other in self.runs
            if other is not run
            and other.teacher is None
            and other.student == run.student
            and other.manifest.get("val_shards") == run.manifest.get("val_shards")
        )
        return next(alone, None) if run.teacher is not None else None

    def against_baseline(self, run: RunRecord) -> tuple[RunRecord, Dump, Dump] | None:
        """The baseline of a run, the dump of the run, the dump of the baseline; None where any of them is missing, or the dumps
        are of two splits."""
        baseline = self.baseline_of(run)
        if baseline is None or run.dump is None or baseline.dump is None or not run.dump.has_split_of(baseline.dump):
            return None
        return baseline, run.dump, baseline.dump

    @cached_property
    def everyone(self) -> dict[str, Dump]:
        """The dumps by the name of who speaks: teacher, students alone, distilled students; none twice."""
        found: dict[str, Dump] = {}
        for run in self.distilled:
            if run.teacher is not None and run.teacher_dump is not None:
                found.setdefault(f"teacher {run.teacher}", run.teacher_dump)
        for run in self.distilled:
            baseline = self.baseline_of(run)
            if baseline is not None and baseline.dump is not None:
                found.setdefault(baseline.name, baseline.dump)
        for run in self.distilled:
            if run.dump is not None:
                found[run.name] = run.dump
        return found

    @cached_property
    def voices(self) -> dict[str, Dump]:
        """Those of everyone that are of one split, the last one's, and can be compared image by image."""
        last = next(reversed(self.everyone.values()), None)
        return {name: dump for name, dump in self.everyone.items() if last is not None and dump.has_split_of(last)}

    def missing_dumps(self) -> dict[Path, list[str]]:
        """Every dump that is missing and could be made, and the options of `pipelines/evaluate.py` that write it."""
        found = {}
        for run in dict.fromkeys([*self.distilled, *filter(None, map(self.baseline_of, self.distilled))]):
            shared = ["--val", str(self.split or run.recipe["data"]["val"]), *run.imports]
            shared += ["--mixed-precision", run.manifest["mixed_precision"]]
            student = run.folder / "student"
            if run.dump is None and student.is_dir():
                found[run.folder / STUDENT_DUMP] = ["--model", f"local-dir:{student}", *shared]
            teacher = run.recipe["teacher"]
            if run.teacher is not None and run.teacher_dump is None and teacher["weights"] != "random":
                classes = ["--class-map", teacher["class_map"]] if teacher.get("class_map") else []
                weights = ["--weights", _teacher_weights(run.folder, run.recipe)]
                found[run.folder / TEACHER_DUMP] = ["--model", run.teacher, *weights, *classes, *shared]
        return {file: [*options, "--dump", str(file)] for file, options in found.items()}


def _teacher_weights(folder: Path, recipe: dict[str, Any]) -> str:
    """The recipe's, or where the run keeps those of a teacher that it trained."""
    weights = str(recipe["teacher"]["weights"])
    return str(folder / "teacher" / "student") if weights == "train" else weights


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file; one that a kill cut short is left out. ValueError for a damaged one."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is damaged ({error}); take it out") from error
    return found


def _object(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """The object of a JSON file. Raises ValueError where it is none, or has no number or object under one of these keys."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), (int, float, dict)) for key in keys):
        raise ValueError(f"{path}: no file of this version of the program, or a damaged one; it needs {', '.join(keys)}")
    return found


def _dump(*places: Path) -> Dump | None:
    """The dump in the first of these files that is there."""
    found = next((place for place in places if place.is_file()), None)
    return None if found is None else Dump.load(found)
