"""Says which pairs of timm models can be distilled, and how: `explain` one pair, or check every architecture with `matrix`.

python pipelines/pairs.py explain resnet34.tv_in1k resnet18
python pipelines/pairs.py matrix --pattern 'resnet*' --out compatibility.csv
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

import torch

from distill.command_line import Parser, command, new_file, requests, whole_number
from distill.models.build import ProbedModel, published_without_classifier
from distill.models.describe import Description, Uninitialised, create_outline, describe, outlined, probed_with_noise
from distill.protocols import Criterion, DataFacts, Needs, Regions
from pipelines.measure.compatibility import check_all
from pipelines.setup.arguments import add_import_option, import_files
from pipelines.setup.models import served_losses

REGIONS = Regions(scales=(1, 2, 4))
WEAK_WARNING = ("a1", "a2", "a3", "b1k", "b2k", "c1", "c2", "d", "ra", "ra2", "ra3", "bt")
PAPERS_TEACHERS = {"resnet34": "tv_in1k", "resnet50": "tv_in1k"}
"""The papers' ImageNet teachers: torchvision's first weights."""


@command
def main(argv: Sequence[str]) -> int:
    """Prints what is asked for. Raises RecipeError for names that timm does not know; 1 where a check of the matrix failed."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain_parser = commands.add_parser("explain", help="what a pair gives, costs and can be trained with")
    explain_parser.add_argument("teacher")
    explain_parser.add_argument("student")
    explain_parser.add_argument("--num-classes", type=whole_number(1), default=1000, help="classes of the data")
    explain_parser.add_argument(
        "--teacher-classes",
        type=whole_number(0),
        help="classes of the teacher, 0: no classifier; default: 0 where its published weights have none, else the data's",
    )
    add_import_option(explain_parser)
    explain_parser.add_argument("--json", action="store_true", help="print one JSON object")
    matrix_parser = commands.add_parser("matrix", help="check every architecture of timm; goes on where it stopped")
    matrix_parser.add_argument("--pattern", default="*", help="names to check, as in timm.list_models")
    matrix_parser.add_argument("--out", type=Path, default=Path("compatibility.csv"), help="rows already there are kept")
    matrix_parser.add_argument("--page", type=new_file, help="write the table as a Markdown page too")
    arguments = parser.parse_args(argv)
    with requests():
        if arguments.command == "matrix":
            return check_all(arguments.pattern, arguments.out, arguments.page, Needs((REGIONS,)))
        import_files(arguments.imports)
        print(explain(arguments.teacher, arguments.student, arguments.num_classes, arguments.teacher_classes, arguments.json))
    return 0


def explain(teacher_name: str, student_name: str, num_classes: int, teacher_classes: int | None, as_json: bool) -> str:
    """What the pair is and what works, as a run would find it."""
    if teacher_classes is None:
        teacher_classes = 0 if published_without_classifier(teacher_name) else num_classes
    with ExitStack() as noise, named_failures(teacher_name, student_name):
        theirs, ours = (
            noise.enter_context(probed_with_noise(create_outline(name, num_classes=classes), name=name, frozen=frozen))
            for name, classes, frozen in ((teacher_name, teacher_classes, True), (student_name, num_classes, False))
        )
        criteria = losses_of(theirs, ours)
        teacher, student = (describe(each, Needs((REGIONS,))) for each in (theirs, ours))
    report = {
        "teacher": as_values(teacher),
        "student": as_values(student),
        "losses": {name: how(each, teacher, student) for name, each in criteria.items()},
        "trained_parameters": trained_parameters(criteria),
        "teacher_share_of_step": teacher_share(teacher, student),
        "warnings": warnings(teacher, student, num_classes),
    }
    return json.dumps(report, indent=2) if as_json else as_text(teacher, student, report)


@contextmanager
def named_failures(*names: str) -> Iterator[None]:
    """ValueError that names the models where something inside fails: timm has more kinds of models than anybody tried."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and any(name in str(error) for name in names):
            raise
        first = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"{' and '.join(names)}: cannot be explained ({type(error).__name__}: {first})") from error


def as_values(model: Description) -> dict[str, Any]:
    """The description as plain values, without the tensors of its layers."""
    facts = dataclasses.replace(model.facts, preactivation_norms=(), classifier=None)
    return dataclasses.asdict(dataclasses.replace(model, facts=facts))


def losses_of(teacher: ProbedModel, student: ProbedModel) -> dict[str, Criterion | str]:
    """Every loss of the table over two outlines, or the reason why it is refused."""
    classes = student.facts.num_classes
    # an image of each class stands for the data; the papers' batch, for some losses are made for its size
    data = DataFacts(classes, torch.arange(classes), micro_batch=64)
    with Uninitialised():  # nobody runs the losses: regressors to a teacher's 3,000 channels would take gigabytes
        return served_losses(student, teacher, data, build=outlined)


def how(criterion: Criterion | str, teacher: Description, student: Description) -> str:
    """What a loss reads of both models and by which mechanism, or why it is refused."""
    if isinstance(criterion, str):
        return f"refused: {criterion}"
    reads = [("student", student, criterion.student_needs)]
    if criterion.teacher_needs is not None:
        reads = [("teacher", teacher, criterion.teacher_needs), *reads]
    return "; ".join(f"{role}: {' and '.join(_named(needs, model)) or 'nothing'}" for role, model, needs in reads)


def _named(needs: Needs, model: Description) -> Iterator[str]:
    for field in dataclasses.fields(needs):
        asked, name = getattr(needs, field.name), field.name.replace("_", " ")
        if asked and field.name == "region_logits":
            yield f"{name} by {model.mechanism}"
        elif asked:
            numbers = isinstance(asked, tuple) and field.name != "region_features"
            yield f"{name} {', '.join(map(str, asked))}" if numbers else name


def trained_parameters(criteria: Mapping[str, Criterion | str]) -> dict[str, int]:
    """Parameters that a loss trains beside the student (projectors), for those that have any."""
    made = {name: each for name, each in criteria.items() if not isinstance(each, str)}
    counts = {name: sum(p.numel() for p in each.parameters()) for name, each in made.items()}
    return {name: count for name, count in counts.items() if count}


def teacher_share(teacher: Description, student: Description) -> float:
    """The teacher's share of a step's arithmetic: its forward beside the student's forward and backward (twice a forward)."""
    return teacher.flops / (teacher.flops + 3 * student.flops)


def warnings(teacher: Description, student: Description, num_classes: int) -> list[str]:
    """Warnings of what is known to go wrong with such a pair."""
    found = []
    architecture, _, tag = teacher.name.partition(".")
    papers = PAPERS_TEACHERS.get(architecture)
    if papers and tag != papers:
        found.append(f"the papers' teacher is {architecture}.{papers}; {teacher.name} has other weights")
    tag = tag or default_tag(teacher.name)
    if tag.split("_")[0] in WEAK_WARNING:
        found.append(f"weights {tag} come of a strong training recipe; such a teacher can make a small student worse")
    if not teacher.facts.num_classes:
        found.append(f"{teacher.name} is taken without a classifier: losses that read its logits are refused")
    elif teacher.classes_of_weights != num_classes:
        found.append(f"the teacher's default weights have {teacher.classes_of_weights} classes, not {num_classes}")
    for model in (teacher, student):
        if model.mechanism.startswith("token"):
            found.append(f"{model.name} reads class tokens: its region logits are a definition ({model.mechanism}) of no paper")
        if model.head_batchnorms and model is student:
            found.append(f"{model.name} has BatchNorm in its head: regions are normalised by the images' statistics")
    if teacher.input_spec.height != student.input_spec.height:
        found.append(
            f"inputs differ ({teacher.input_spec.height} and {student.input_spec.height} px): images are resized on the device"
        )
    return found


def default_tag(name: str) -> str:
    """The tag of the weights that timm takes for a name without one."""
    from timm.models import get_pretrained_cfg, is_model

    cfg = get_pretrained_cfg(name) if is_model(name) else None
    return (cfg.tag or "") if cfg else ""


def as_text(teacher: Description, student: Description, report: dict) -> str:
    """The report for people."""
    lines = []
    for role, model in (("teacher", teacher), ("student", student)):
        spec, stages = model.input_spec, [stage.channels for stage in model.facts.stages]
        size = f"{model.parameters / 1e6:.2f} M parameters, {model.flops / 1e9:.2f} GFLOP an image"
        lines += [
            f"{role}: {model.name} ({model.kind}), {size}",
            f"  {spec.height}x{spec.width} {spec.interpolation}, crop {spec.crop_fraction}, mean {spec.mean}, std {spec.std}",
            f"  head reads {model.features}, grid {model.grid[0]}x{model.grid[1]}, stages {stages}",
            f"  region logits: {model.refusal or model.mechanism}",
        ]
    lines.append("losses:")
    lines += [f"  {name}: {how}" for name, how in report["losses"].items()]
    trained = ", ".join(f"{name} {count:,}" for name, count in report["trained_parameters"].items())
    lines.append(f"parameters that losses train beside the student: {trained or 'none'}")
    lines.append(f"teacher's share of a step: {report['teacher_share_of_step']:.0%} of the arithmetic")
    lines += [f"warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.getLogger("distill.models.region_logits.find").setLevel(
        logging.ERROR
    )  # report and table name the mechanism themselves
    sys.exit(main())
