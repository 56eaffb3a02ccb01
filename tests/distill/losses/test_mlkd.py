"""MLKD: what is plain counts as released, however processes share the rows; what is mended selects."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.losses.logits import kd_loss
from distill.losses.mlkd import mlkd_loss
from distill.protocols import ModelOutput, Target
from tests.distill.losses.outputs import made, model_output
from tests.distill.losses.refusals import refused_in_one_line

PLAIN = torch.tensor([True, False, False, True, True, False, True, False])
OPTIONS = [{}, {"mended": True}, {"temperature": 2.0, "standardise": True}]
EACH = pytest.mark.parametrize("options", OPTIONS, ids=str)


def logits(seed: int = 0, rows: int = 8, classes: int = 7, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = scale * torch.randn(2, rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn[0].requires_grad_(), drawn[1]


def slope(student: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, student)
    return found


def as_meant(student: torch.Tensor, teacher: torch.Tensor, plain: torch.Tensor) -> list[torch.Tensor]:
    """The mended loss of a batch of two halves, row by row and with numpy's percentiles."""
    mine, theirs = student[plain], teacher[plain]
    sure = theirs.softmax(1).amax(1)
    rows = torch.from_numpy(sure.numpy() <= np.percentile(sure.numpy(), 50))
    of_class = theirs.softmax(1).sum(0)
    classes = torch.from_numpy(of_class.numpy() <= np.percentile(of_class.numpy(), 50))
    parts = torch.zeros(3, dtype=torch.float64)
    for temperature in (4.0, 3.0, 5.0, 2.0, 6.0):
        weak = kd_loss(mine[rows], theirs[rows], temperature).sum() / len(mine)
        strong = kd_loss(student[~plain], teacher[~plain], temperature).mean()
        own, other = (mine / temperature).softmax(1), (theirs / temperature).softmax(1)
        images = (other @ other.T - own @ own.T).square()[:, rows].sum() / len(mine)
        pairs = (other.T @ other - own.T @ own).square()[:, classes].sum() / student.shape[1]
        parts = parts + torch.stack([weak + strong, images, pairs])
    return list(parts)


def test_what_is_mended_selects_the_rows_and_classes_of_which_the_teacher_is_least_sure():
    student, teacher = logits()
    found = mlkd_loss(student, teacher, PLAIN, mended=True)
    torch.testing.assert_close(list(found), as_meant(student, teacher, PLAIN))
    sure = teacher.softmax(1).amax(1)
    selected = PLAIN & (sure <= torch.from_numpy(np.percentile(sure[PLAIN].numpy(), [50])))
    assert selected.sum() == 2
    gradient = slope(student, found.instances)
    assert torch.equal(gradient.abs().amax(1) > 0, selected | ~PLAIN)


def test_as_released_every_row_counts_and_altered_ones_at_three_temperatures_only():
    student, teacher = logits()
    found = mlkd_loss(student, teacher, PLAIN)
    altered = sum(kd_loss(student[~PLAIN], teacher[~PLAIN], each).mean() for each in (4.0, 3.0, 5.0))
    gradient = slope(student, found.instances)
    torch.testing.assert_close(gradient[~PLAIN], slope(student, altered)[~PLAIN])
    assert (gradient[PLAIN].abs().amax(1) > 0).all()


@EACH
def test_equal_logits_cost_nothing_and_have_no_gradient(options):
    _, teacher = logits()
    student = teacher.clone().requires_grad_()
    levels = torch.stack(mlkd_loss(student, teacher, PLAIN, **options))
    assert torch.equal(levels, torch.zeros(3, dtype=torch.float64))
    assert slope(student, levels.sum()).abs().max() < 1e-15


@EACH
def test_the_mean_over_processes_is_the_same_whoever_has_the_plain_rows(options):
    """One process with all rows, or two of which one has the plain rows and the other the altered ones: in any such split, each
    process's P P^T and the medians are those of all plain rows."""
    student, teacher = logits()
    whole = torch.stack(mlkd_loss(student, teacher, PLAIN, **options))
    apart = [mlkd_loss(student[rows], teacher[rows], PLAIN[rows], **options) for rows in (PLAIN, ~PLAIN)]
    mean = torch.stack([torch.stack(each) for each in apart]).mean(0)
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(slope(student, mean.sum()), slope(student, whole.sum()))
    assert [part.item() for part in apart[1]][1:] == [0.0, 0.0]


@EACH
def test_the_order_of_the_rows_does_not_matter(options):
    (student, teacher), order = logits(), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    whole = torch.stack(mlkd_loss(student, teacher, PLAIN, **options))
    torch.testing.assert_close(torch.stack(mlkd_loss(student[order], teacher[order], PLAIN[order], **options)), whole)


@EACH
@pytest.mark.parametrize("plain", [PLAIN, torch.ones(8).bool(), torch.zeros(8).bool()], ids=["both", "plain", "altered"])
def test_large_logits_and_batches_of_one_kind_stay_finite(plain, options):
    student, teacher = (each.detach().float() for each in logits(scale=1e4))
    student.requires_grad_()
    levels = torch.stack(mlkd_loss(student, teacher, plain, **options))
    assert levels.isfinite().all()
    assert slope(student, levels.sum()).isfinite().all()


def output(rows: int) -> ModelOutput:
    return model_output("student", made("mlkd").student_needs, batch=rows)


REFUSED = {
    "no word on the rows": (
        lambda: made("mlkd")(output(4), output(4), Target(torch.zeros(4).long())),
        r"mlkd tells plain views from altered ones and was not told which are; give Target\(plain=...\)",
    ),
    "numbers instead of a mask": (
        lambda: mlkd_loss(*logits(), torch.zeros(8)),
        r"plain is torch.float32 \[8\]; it must be bool \[8\], one per row",
    ),
    "another batch": (lambda: mlkd_loss(*logits(), PLAIN[:7]), r"plain is torch.bool \[7\]; it must be bool \[8\]"),
    "no teacher": (lambda: made("mlkd")(output(4), None, Target(torch.zeros(4).long())), "mlkd compares with a teacher"),
    "a temperature of 0": (lambda: made("mlkd", temperature=0.0), "temperature 0.0 must be positive"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_in_one_line(case):
    refused_in_one_line(*REFUSED[case])
