"""A loss of anybody's is looked at before a run: what is wrong with it is one line, with the remedy."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.distiller import Distiller
from distill.errors import LossError
from distill.loss_options import RUN_PARAMETERS, check_loss, loss_options, option_descriptions, summary
from distill.losses import LOSSES
from distill.protocols import Criterion, ModelFacts, ModelOutput, Regions, Target


class Sound(Criterion):
    """A loss that is as the protocol says,
    in two lines.

    Args:
        student: facts of the student.
        share: what is kept, in
            two lines.
    """

    teacher_needs = None

    def __init__(self, student: ModelFacts | None = None, *, share: float = 1.0) -> None:
        super().__init__()

    def forward(self, student, teacher, target):
        return torch.zeros((), requires_grad=True), {}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_table_is_sound_and_describes_its_options(name: str):
    check_loss(name, LOSSES[name])
    assert list(loss_options(LOSSES[name])) == [key for key in option_descriptions(LOSSES[name]) if key not in RUN_PARAMETERS]
    assert summary(LOSSES[name])


def test_descriptions_are_read_from_the_docstring():
    assert summary(Sound) == "A loss that is as the protocol says, in two lines."
    assert option_descriptions(Sound) == {"student": "facts of the student.", "share": "what is kept, in two lines."}
    check_loss("sound", Sound)


def test_a_loss_without_a_constructor_and_without_a_docstring_is_sound():
    class Bare(Criterion):
        forward = Sound.forward

    check_loss("bare", Bare)
    assert (loss_options(Bare), summary(Bare)) == ({}, "")


def constructed(source: str, **names: Any) -> type:
    """A loss with this constructor."""
    scope: dict[str, Any] = {"Tensor": Tensor, "ModelFacts": ModelFacts, **names}
    exec(f"def __init__({source}): pass", scope)
    return type("Made", (Sound,), {"__init__": scope["__init__"]})


@pytest.mark.parametrize(
    ("constructor", "expected"),
    [
        ("self, *, alpha=1.0", r"option alpha: without a type; annotate it, as in `alpha: float = 1.0`"),
        ("self, *, weight: float = 1.0", r"option weight: every loss of a recipe has a key of this name"),
        ("self, *, start_epoch: int = 1", r"option start_epoch: every loss of a recipe has a key of this name"),
        ("self, num_samples: int", r"asks the run for num_samples; a run gives student, teacher, data"),
        ("self, student: ModelFacts, *others, alpha: float = 1.0", r"takes \*others; a run gives every parameter by its name"),
        ("self, *, alpha: Tensor", r"option alpha: <class 'torch.Tensor'> = .*: a recipe holds numbers, text"),
        ("self, *, alpha: 'Unknown' = 1", r"type cannot be found: name 'Unknown' is not defined"),
        ("self, *, alpha: int = 'x'", r"option alpha: its default 'x': Input should be a valid integer"),
        ("self, *, alpha: object = Tensor()", r"option alpha: <class 'object'> = .*: a recipe holds numbers, text"),
        ("self, *, _alpha: int = 1", r"option _alpha: the name must not begin with _"),
    ],
)
def test_a_constructor_that_no_recipe_could_serve_is_refused(constructor: str, expected: str):
    with pytest.raises(ValueError, match=rf"^loss\.made: .*{expected}") as caught:
        check_loss("made", constructed(constructor))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (nn.CrossEntropyLoss, r"CrossEntropyLoss is no subclass of distill.protocols.Criterion"),
        (Sound(), r"is no subclass of distill.protocols.Criterion"),
        (type("Made", (Criterion,), {}), r"it has no forward"),
        (
            type("Made", (Sound,), {"forward": lambda self, student, teacher, labels: None}),
            r"forward takes \(student, teacher, labels\); it must take \(student, teacher, target\), where target.labels are",
        ),
        (
            type("Made", (Sound,), {"build_student": staticmethod(lambda student, teacher, *, share: None)}),
            r"build_student: got an unexpected keyword argument 'student_images'; it is a static method of",
        ),
    ],
)
def test_a_class_that_is_no_criterion_is_refused(loss: Any, expected: str):
    with pytest.raises(ValueError, match=rf"^loss\.made: .*{expected}"):
        check_loss("made", loss)


@pytest.mark.parametrize("name", ["half", "keys", "training", "total", "eval"])
def test_a_name_that_is_taken_is_refused(name: str):
    with pytest.raises(ValueError, match=rf"^loss\.{name}: the name {name} is taken"):
        check_loss(name, Sound)
    with pytest.raises(ValueError, match="must be made of letters, digits and _"):
        check_loss("my-loss", Sound)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.zeros(()), r"forward gave a tensor \[\]; it must give \(loss, dictionary of statistics\)"),
        (None, "forward gave a NoneType; it must give"),
        ((torch.zeros(()),), "forward gave a tuple; it must give"),
        ((torch.zeros(3), {}), r"forward gave a tensor \[3\] as the loss; it must be a tensor of no dimension"),
        ((0.0, {}), "forward gave a float as the loss"),
        ((torch.zeros(()), {"seen": torch.zeros(2)}), r"forward gave a tensor \[2\] as statistic seen"),
        ((torch.zeros(()), {"seen": 1.0}), "forward gave a float as statistic seen"),
    ],
)
def test_what_a_loss_gives_is_looked_at_when_it_is_called(given: Any, expected: str):
    loss = type("Made", (Sound,), {"forward": lambda self, student, teacher, target: given})
    distiller = Distiller(nn.Identity(), {"made": loss()}, {"made": lambda _: 1.0})
    with pytest.raises(LossError, match=rf"^loss\.made: {expected}"):
        distiller(torch.zeros(1), None, Target(torch.zeros(1)))


class Idle(Sound):
    """A loss with a parameter that its value does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.frozen = nn.Linear(2, 2), nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, student, teacher, target):
        return student.mean() + self.idle.bias.sum(), {}


class Detached(Sound):
    """A loss whose value has no gradient."""

    def forward(self, student, teacher, target):
        return student.detach().mean(), {}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(Idle, r"its value gives idle\.weight no gradient; compute it"), (Detached, "its value has no gradient; compute it")],
)
def test_a_loss_that_leaves_something_untrained_is_refused_at_the_first_step_of_training(loss: type, expected: str):
    distiller = Distiller(nn.Linear(3, 2), {"made": loss()}, {"made": lambda _: 1.0})
    inputs = (torch.ones(4, 3), None, Target(torch.zeros(4)))
    with torch.no_grad():
        distiller(*inputs)
    distiller.eval()(*inputs)
    with pytest.raises(LossError, match=rf"^loss\.made: {expected}"):
        distiller.train()(*inputs)


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        (lambda student, teacher: student.embedding + 1, "student.embedding, and its student_needs .*Needs(embedding=True)"),
        (lambda student, teacher: student.logits * teacher.head_bias, "teacher.head_bias, .* teacher_needs .*(head_bias=True)"),
        (lambda student, teacher: teacher.stages[-2], "teacher.stages[-2], .* teacher_needs do not say so; .*(stages=(-2,))"),
        (lambda student, teacher: student.region_logits[Regions()], "student.region_logits[Regions("),
    ],
)
def test_a_loss_that_reads_what_it_did_not_ask_for_is_told_the_need(reads: Any, expected: str):
    """It used to end in a TypeError on None."""
    loss = type("Made", (Sound,), {"forward": lambda self, student, teacher, target: (reads(student, teacher).mean(), {})})
    output = ModelOutput(torch.ones(2, 3), torch.ones(2, 4, 1, 1), {}, {}, {})
    student = nn.Identity()
    student.forward = lambda images: output
    distiller = Distiller(student, {"made": loss()}, {"made": lambda _: 1.0})
    pattern = re.escape(expected).replace(r"\.\*", ".*").replace(r"\ ", " ")
    with pytest.raises(LossError, match=rf"^loss\.made: reads {pattern}"):
        distiller(torch.zeros(1), output, Target(torch.zeros(2)))
