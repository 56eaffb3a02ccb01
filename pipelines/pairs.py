"""Which pairs of timm models can be distilled, and how: `explain` one pair, or check every architecture with `matrix`.

python pipelines/pairs.py explain resnet34.tv_in1k resnet18
python pipelines/pairs.py matrix --pattern 'resnet*' --out compatibility.csv
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.losses.msdcrd import MSDCRD
from distill.models.describe import Description, create_outline, describe
from distill.protocols import Needs, Regions
from pipelines.measure.compatibility import check_all
from pipelines.setup.arguments import Parser, add_import_option, command, import_files, requests

REGIONS = Regions(scales=(1, 2, 4))
WEAK_WARNING = ("a1", "a2", "a3", "b1k", "b2k", "c1", "c2", "d", "ra", "ra2", "ra3", "bt")
PAPERS_TEACHERS = {"resnet34": "tv_in1k", "resnet50": "tv_in1k"}
"""The papers' ImageNet teachers: torchvision's first weights."""


@command
def main(argv: Sequence[str]) -> int:
    """What is asked for, printed. Raises RecipeError where nothing works for the pair; 1 where a check of the matrix failed."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain_parser = commands.add_parser("explain", help="what a pair gives, costs and can be trained with")
    explain_parser.add_argument("teacher")
    explain_parser.add_argument("student")
    explain_parser.add_argument("--num-classes", type=int, default=1000)
    add_import_option(explain_parser)
    explain_parser.add_argument("--json", action="store_true", help="print one JSON object")
    matrix_parser = commands.add_parser("matrix", help="check every architecture of timm; goes on where it stopped")
    matrix_parser.add_argument("--pattern", default="*", help="names to check, as in timm.list_models")
    matrix_parser.add_argument("--out", type=Path, default=Path("compatibility.csv"), help="rows already there are kept")
    matrix_parser.add_argument("--page", type=Path, help="write the table as a Markdown page too")
    arguments = parser.parse_args(argv)
    with requests():
        if arguments.command == "matrix":
            return check_all(arguments.pattern, arguments.out, arguments.page, Needs((REGIONS,)))
        import_files(arguments.imports)
        explain(arguments.teacher, arguments.student, arguments.num_classes, arguments.json)
    return 0


def explain(teacher_name: str, student_name: str, num_classes: int, as_json: bool) -> None:
    """Prints what the pair is and what works."""
    teacher, student = (look_at(name, num_classes) for name in (teacher_name, student_name))
    report = {
        "teacher": as_values(teacher),
        "student": as_values(student),
        "losses": losses(teacher, student),
        "projector_parameters": projector_parameters(teacher, student),
        "teacher_share_of_step": teacher_share(teacher, student),
        "warnings": warnings(teacher, student, num_classes),
    }
    print(json.dumps(report, indent=2) if as_json else as_text(teacher, student, report))


def as_values(model: Description) -> dict[str, Any]:
    """The description as plain values, without the tensors of its normalisation layers."""
    return dataclasses.asdict(dataclasses.replace(model, facts=dataclasses.replace(model.facts, preactivation_norms=())))


def look_at(name: str, num_classes: int) -> Description:
    """The description of an architecture with fresh weights."""
    return describe(create_outline(name, num_classes=num_classes), name, Needs((REGIONS,)))


def losses(teacher: Description, student: Description) -> dict[str, str]:
    """The mechanism by which each family of losses works, or why it does not."""
    refused = [m for m in (teacher, student) if m.refusal]
    sdd = "; ".join(m.refusal for m in refused) or f"teacher {teacher.mechanism}, student {student.mechanism}"
    stages = min(len(teacher.facts.stages), len(student.facts.stages))
    categories = teacher.refusal or f"{stages} stage(s), the teacher's categories by {teacher.mechanism}"
    return {"cross_entropy, kd, dkd, nkd": "logits", "sdd": sdd, "msdcrd": categories}


def projector_parameters(teacher: Description, student: Description) -> dict[str, int]:
    """What MSDCRD's default projectors add while training, for the last stage and for all."""
    counts = {}
    for stages in ("last", "all"):
        criterion = MSDCRD(student.facts, teacher.facts, stages=stages)
        counts[stages] = sum(p.numel() for p in criterion.parameters())
    return counts


def teacher_share(teacher: Description, student: Description) -> float:
    """The teacher's share of a step's arithmetic: its forward beside the student's forward and backward (twice a forward)."""
    return teacher.flops / (teacher.flops + 3 * student.flops)


def warnings(teacher: Description, student: Description, num_classes: int) -> list[str]:
    """What is known to go wrong with such a pair."""
    found = []
    architecture, _, tag = teacher.name.partition(".")
    papers = PAPERS_TEACHERS.get(architecture)
    if papers and tag != papers:
        found.append(f"the papers' teacher is {architecture}.{papers}; {teacher.name} has other weights")
    tag = tag or default_tag(teacher.name)
    if tag.split("_")[0] in WEAK_WARNING:
        found.append(f"weights {tag} come of a strong training recipe; such a teacher can make a small student worse")
    if teacher.classes_of_weights != num_classes:
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
    projector = report["projector_parameters"]
    lines.append(f"projector parameters: {projector['last']:,} for the last stage, {projector['all']:,} for all")
    lines.append(f"teacher's share of a step: {report['teacher_share_of_step']:.0%} of the arithmetic")
    lines += [f"warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.getLogger("distill.models.region_logits.find").setLevel(
        logging.ERROR
    )  # report and table name the mechanism themselves
    sys.exit(main())
