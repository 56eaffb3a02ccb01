"""Losses over maps, pre-activations and heads get what they read from real timm models, and refuse what they cannot have."""

from __future__ import annotations

import pytest
import torch

from distill.loss_options import run_parameters
from distill.losses import LOSSES
from distill.models.build import ProbedModel, create_student, create_teacher
from distill.protocols import Criterion, DataFacts, Progress, Target

BATCH = 8
LABELS = torch.arange(BATCH) % 5
DATA = DataFacts(BATCH, LABELS, BATCH)
TARGET = Target(LABELS, torch.arange(BATCH), Progress(1, 1, 2), plain=LABELS < 2)
METHODS = {
    "cat_kd": {"normalise": True},
    "ctkd": {},
    "mlkd": {},
    "mgd": {},
    "reviewkd": {},
    "ofd": {},
    "semckd": {},
    "fitnet": {"match": "pool"},
    "at": {},
    "sp": {"scales": (1, 2)},
    "pkt": {},
    "rkd": {},
    "crd": {"negatives": 4},
    "wcord": {"negatives": 4},
    "dist": {},
    "wkd_logit": {},
    "wkd_feature": {"grid": 1},
    "vid": {},
    "cc": {},
    "nst": {},
    "srrl": {},
    "ab": {"match": "pool"},
    "ft": {"paraphraser_epochs": 1},
}
PAIRS = {
    "equal grids": (("cifar_resnet8", 32), ("cifar_resnet8x4", 32)),
    "2x2 from 8x8": (("cifar_mobilenetv2_050", 32), ("cifar_resnet8x4", 32)),
    "four stages from a pre-activation net": (("cifar_vgg8", 32), ("cifar_wrn_16_2", 32)),
    "a convolutional net from tokens": (("resnet18", 64), ("vit_tiny_patch16_224", 64)),
    "layer norms": (("convnext_atto", 64), ("resnet18", 64)),
}
REFUSED = {("cat_kd", "a convolutional net from tokens"), ("cat_kd", "layer norms")}
"""Logits that are no mean of an affine map of the cells: a class token, and a norm after the pooling."""


def models(pair: str) -> tuple[ProbedModel, ProbedModel]:
    """Student and teacher, probed."""
    (student, size), (teacher, teacher_size) = PAIRS[pair]
    torch.manual_seed(0)
    fixed = {"img_size": teacher_size} if teacher.startswith("vit") else {}
    mine = create_student(student, num_classes=5, image_size=size)
    theirs = create_teacher(teacher, weights="random", num_classes=5, model_kwargs=fixed)
    return mine, theirs


def made(name: str, student: ProbedModel, teacher: ProbedModel) -> Criterion:
    """The criterion as a run makes it."""
    facts = {"student": student.facts, "teacher": teacher.facts, "data": DATA}
    return LOSSES[name](**{key: facts[key] for key in run_parameters(LOSSES[name])}, **METHODS[name])


@pytest.mark.parametrize("pair", PAIRS)
def test_each_method_trains_each_pair_from_its_stem_on_or_is_refused_with_the_reason(pair):
    student, teacher = models(pair)
    images = torch.rand(BATCH, 3, 64, 64)
    for name in METHODS:
        criterion = made(name, student, teacher)
        if (name, pair) in REFUSED:
            with pytest.raises(ValueError, match="cannot give the bias of its head"):
                [each.backbone(criterion.student_needs) for each in (student, teacher)]
            continue
        mine, theirs = student.backbone(criterion.student_needs), teacher.backbone(criterion.teacher_needs)
        with torch.no_grad():
            target = theirs(images)
        loss, statistics = criterion(mine(images), target, TARGET)
        mine.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(value.isfinite() for value in statistics.values())
        assert next(mine.parameters()).grad.abs().max() > 0, name
        gradients = [p.grad for p in criterion.parameters() if p.grad is not None or not criterion.rests]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
