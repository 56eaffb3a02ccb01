"""What each method adds to a training step of two real pairs: time as a share of the models' own, trained parameters, memory.

    python -m tests.bench.methods [--pair cifar] [--loss NAME ...] [--rounds N] [--json FILE]

Both models run once and their outputs are kept. A round then measures the models' step (the teacher's forward pass, the
student's forward and backward pass under cross-entropy) and, in turn, each loss: forward and backward, from the outputs to
their gradients. The share is the median over the rounds. Seconds are CPU seconds of the process, on one thread. Losses have
their default options. What a loss asks of the models' passes (maps that are kept, logits of regions) is not counted; SimKD's
projector is, which is a part of its student. Memory is what autograd keeps from the loss's forward pass until its backward
pass, beside what the models' outputs and the parameters hold anyway; and the loss's state.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.command_line import Parser, command
from distill.loss_options import run_parameters
from distill.losses import LOSSES
from distill.models.build import ProbedModel, create_student, create_teacher
from distill.models.simkd import build_simkd_student
from distill.protocols import Criterion, DataFacts, ModelFacts, ModelOutput, Needs, Progress, Target
from pipelines.setup.models import needs_of


@dataclass(frozen=True)
class Pair:
    """Teacher, student, and the data that they would be trained with."""

    teacher: str
    student: str
    size: int
    classes: int
    batch: int
    samples: int


PAIRS = {
    "cifar": Pair("cifar_resnet32x4", "cifar_resnet8x4", 32, 100, 64, 50_000),
    "imagenet": Pair("resnet34", "resnet18", 224, 1000, 16, 1_281_167),
}
METHODS = [name for name, loss in LOSSES.items() if loss.teacher_needs is not None]


@dataclass
class Method:
    """A loss over kept outputs of both models."""

    criterion: Criterion
    projector: nn.Module | None
    student: ModelOutput
    teacher: ModelOutput
    target: Target
    seconds: list[float] = field(default_factory=list)

    def loss(self) -> Tensor:
        """The forward pass."""
        student = self.student
        if self.projector is not None:
            student = student._replace(feature_map=self.projector(student.feature_map))
        value, _ = self.criterion(student, self.teacher, self.target)
        return value

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimiser changes beside the student's own weights."""
        return [p for module in (self.criterion, self.projector) if module is not None for p in module.parameters()]

    @property
    def state_bytes(self) -> int:
        """What the loss remembers from step to step, as checkpoints keep it."""
        parameters = sum(p.nbytes for p in self.criterion.parameters())
        return sum(each.nbytes for each in self.criterion.state_dict().values()) - parameters


def leaves(output: ModelOutput) -> ModelOutput:
    """The output as if nothing had made it: equal tensors are one leaf, which takes a gradient."""
    found: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if id(tensor) not in found:
            found[id(tensor)] = tensor.detach().requires_grad_()
        return found[id(tensor)]

    def entry(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: leaf(each) for key, each in value.items()}
        return None if value is None else leaf(value)

    return ModelOutput(*map(entry, output))


def made(name: str, student: ModelFacts, teacher: ModelFacts, data: DataFacts) -> Criterion:
    """The loss with its default options."""
    if LOSSES[name].build_student is not None:
        student = teacher
    facts = {"student": student, "teacher": teacher, "data": data}
    criterion = LOSSES[name](**{key: facts[key] for key in run_parameters(LOSSES[name])})
    return criterion.to(memory_format=torch.channels_last)


def build(pair: Pair, names: Sequence[str]) -> tuple[Callable[[], None], dict[str, Method]]:
    """The models' step, and the methods over the outputs of one such step."""
    torch.manual_seed(0)
    student = create_student(pair.student, num_classes=pair.classes, image_size=pair.size)
    teacher = create_teacher(pair.teacher, weights="random", num_classes=pair.classes)
    data = DataFacts(pair.samples, torch.arange(pair.samples) % pair.classes, pair.batch)
    rows = torch.arange(pair.batch)
    target = Target(rows % pair.classes, rows, Progress(0, 10, 100), torch.Generator(), plain=rows < pair.batch // 2)
    criteria = {name: made(name, student.facts, teacher.facts, data) for name in names}
    mine_needs, theirs_needs = needs_of(criteria)
    images = torch.rand(pair.batch, pair.size, pair.size, 3).permute(0, 3, 1, 2)
    with torch.no_grad():
        theirs = backbone(teacher, theirs_needs)(images)
    mine = backbone(student, mine_needs)(images)
    methods = {}
    for name, criterion in criteria.items():
        projector = projector_of(student, teacher) if criterion.build_student is not None else None
        methods[name] = Method(criterion, projector, leaves(mine), theirs, target)
    plain = backbone(student, Needs()), backbone(teacher, Needs())

    def step() -> None:
        with torch.no_grad():
            plain[1](images)
        F.cross_entropy(plain[0](images).logits, target.labels).backward()
        plain[0].zero_grad()

    return step, methods


def backbone(model: ProbedModel, needs: Needs) -> nn.Module:
    """The model as a run has it."""
    return model.backbone(needs).to(memory_format=torch.channels_last)


def projector_of(student: ProbedModel, teacher: ProbedModel) -> nn.Module:
    """What SimKD's student has between its body and the teacher's classifier."""
    images = {"student_images": student.anatomy.images, "teacher_images": teacher.anatomy.images}
    projected: Any = build_simkd_student(student.model, teacher.model, **images, factor=2)
    return projected.projector.to(memory_format=torch.channels_last)


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds of the process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def both_ways(method: Method) -> None:
    """Forward and backward."""
    method.loss().backward()
    for each in method.trained:
        each.grad = None


def kept_bytes(method: Method) -> int:
    """Bytes that autograd keeps from the forward pass of the loss, without what the outputs and the parameters hold."""
    known = {storage(p) for p in method.trained} | {storage(p) for p in method.criterion.buffers()}
    for output in (method.student, method.teacher):
        for value in output:
            known |= {storage(each) for each in (value.values() if isinstance(value, Mapping) else [value]) if each is not None}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage(tensor) not in known:
            kept[storage(tensor)] = tensor  # held, so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def storage(tensor: Tensor) -> int:
    """What tells tensors that share memory."""
    return tensor.untyped_storage().data_ptr()


def measure(pair: Pair, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Figures of each method: share of the models' step, its range, parameters, bytes kept and bytes of state."""
    step, methods = build(pair, names)
    step()
    for method in methods.values():
        both_ways(method)
    models: list[float] = []
    for _ in range(rounds):
        models.append(seconds(step))
        for method in methods.values():
            method.seconds.append(seconds(lambda method=method: both_ways(method)))  # type: ignore[misc]
    found = {}
    for name, method in methods.items():
        shares = [own / whole for own, whole in zip(method.seconds, models, strict=True)]
        found[name] = {
            "share": statistics.median(shares),
            "least": min(shares),
            "most": max(shares),
            "parameters": sum(p.numel() for p in method.trained),
            "kept": kept_bytes(method),
            "state": method.state_bytes,
        }
    return found


def row(name: str, found: Mapping[str, float]) -> str:
    """One line of the table, in Markdown."""
    share = f"{100 * found['share']:.2f} | {100 * found['least']:.2f} to {100 * found['most']:.2f}"
    state = f"{found['state'] / 1e6:,.1f}" if found["state"] > 1e5 else "-"
    return f"| `{name}` | {share} | {found['parameters']:,.0f} | {found['kept'] / 2**20:.1f} | {state} |"


HEADER = """| loss | % of the models' step | range | trained parameters | MiB kept for the backward pass | MB of state |
|---|---:|---|---:|---:|---:|"""


@command
def main(argv: Sequence[str]) -> None:
    """Prints a table for each pair."""
    parser = Parser(prog="python -m tests.bench.methods", description=__doc__)
    parser.add_argument("--pair", action="append", choices=list(PAIRS), help="only this one; may be repeated")
    parser.add_argument("--loss", action="append", choices=METHODS, help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    everything = {}
    for name in asked.pair or PAIRS:
        pair = PAIRS[name]
        everything[name] = measure(pair, asked.loss or METHODS, asked.rounds)
        print(f"\n{pair.teacher} -> {pair.student}, {pair.size} px, batch {pair.batch}, {pair.samples:,} samples\n\n{HEADER}")
        print("\n".join(row(loss, found) for loss, found in everything[name].items()), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
