"""What cannot be right is refused in one line that says what to do; what cannot be seen without waiting comes out as NaN."""

from __future__ import annotations

import pytest
import torch

from distill.losses import LOSSES
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.losses.msdcrd import MSDCRD, contrastive_loss
from distill.losses.projector import AttentionProjector, build_projector
from distill.losses.sdd import SDD, sdd_loss
from distill.protocols import ModelOutput, Needs, Target
from tests.distill.losses.outputs import facts
from tests.distill.losses.refusals import refused_in_one_line

LOGITS = torch.randn(2, 5)
REGIONS = torch.randn(2, 3, 5)
LABELS = torch.tensor([0, 4])
SOFT = torch.full((2, 5), 0.2)
ROWS = torch.randn(4, 3)
CATEGORIES = torch.tensor([0, 1, 2, 3])
OUTPUT = ModelOutput(LOGITS, torch.randn(2, 3, 4, 4), {}, {}, {})
FACTS = {"student": facts(4, 8), "teacher": facts(3, 6, 9)}

REFUSED = {
    "shapes": (lambda: kd_loss(LOGITS, LOGITS[:, :4]), r"student \[2, 5\] and teacher \[2, 4\] differ"),
    "integer logits": (lambda: kd_loss(LOGITS.long(), LOGITS.long()), "student is torch.int64"),
    "no rows": (lambda: kd_loss(LOGITS[:0], LOGITS[:0]), "at least one row"),
    "no classes": (lambda: kd_loss(LOGITS[:, :0], LOGITS[:, :0]), "at least one row and one column"),
    "a scalar": (lambda: kd_loss(torch.tensor(1.0), torch.tensor(1.0)), "at least one row"),
    "zero temperature": (lambda: kd_loss(LOGITS, LOGITS, 0.0), "temperature 0.0 must be positive"),
    "NaN temperature": (lambda: kd_loss(LOGITS, LOGITS, float("nan")), "temperature nan must be positive"),
    "infinite temperature": (lambda: LOSSES["kd"](temperature=float("inf")), "temperature inf must be positive and finite"),
    "label too large": (lambda: dkd_loss(LOGITS, LOGITS, torch.tensor([0, 5])), "run from 0 to 5; .* lie in 0..4"),
    "negative label": (lambda: nkd_loss(LOGITS, LOGITS, torch.tensor([-1, 4])), "run from -1 to 4"),
    "negative label in sdd": (lambda: sdd_loss(REGIONS, REGIONS, torch.tensor([-1, 4])), "run from -1 to 4"),
    "label -100": (lambda: CrossEntropy()(OUTPUT, None, Target(torch.tensor([0, -100]))), "run from -100 to 0"),
    "labels of another batch": (lambda: dkd_loss(LOGITS, LOGITS, LABELS[:1]), r"labels \[1\] must be \[2\]"),
    "boolean labels": (lambda: dkd_loss(LOGITS, LOGITS, LABELS > 0), "labels are torch.bool"),
    "soft labels of another shape": (lambda: nkd_loss(LOGITS, LOGITS, SOFT[:, :4]), r"soft labels \[2, 4\]"),
    "float indices": (lambda: dkd_loss(LOGITS, LOGITS, LABELS.float()), r"soft labels \[2\]"),
    "soft labels in dkd": (lambda: dkd_loss(LOGITS, LOGITS, SOFT), "got soft labels; give class indices"),
    "soft labels in sdd over dkd": (lambda: sdd_loss(REGIONS, REGIONS, SOFT, "dkd"), "got soft labels; give class indices"),
    "one class in dkd": (lambda: dkd_loss(LOGITS[:, :1], LOGITS[:, :1], LABELS * 0), "got 1 class; it needs at least 2"),
    "one class in nkd": (lambda: nkd_loss(LOGITS[:, :1], LOGITS[:, :1], LABELS * 0), "got 1 class; it needs at least 2"),
    "logits for regions": (lambda: sdd_loss(LOGITS, LOGITS, LABELS), r"got \[2, 5\], 2 dimensions; it must have 3"),
    "other regions": (lambda: sdd_loss(REGIONS, REGIONS[:, :2], LABELS), r"\[2, 3, 5\] and teacher \[2, 2, 5\] differ"),
    "unknown base": (lambda: sdd_loss(REGIONS, REGIONS, LABELS, "crd"), "base 'crd' is unknown; choose one of kd, dkd, nkd"),
    "unknown rule": (lambda: SDD(rule="mean"), "rule 'mean' is unknown; choose one of label, class"),
    "unknown reduction": (lambda: SDD(reduction="max"), "reduction 'max' is unknown; choose one of mean, sum"),
    "unknown pooling": (lambda: SDD(pooling="max"), "mode 'max' is unknown"),
    "option of another base": (lambda: SDD(base="kd", beta=2.0), "base 'kd' takes no option 'beta'; it takes temperature"),
    "base option by name": (
        lambda: sdd_loss(REGIONS, REGIONS, LABELS, "nkd", base_options={"alpha": 1}),
        "base 'nkd' takes no option 'alpha'; it takes gamma, temperature, mask_target",
    ),
    "sdd's temperature": (lambda: SDD(temperature=-1.0), "temperature -1.0 must be positive"),
    "a negative weight": (lambda: SDD(complementary_weight=-1.0), "complementary_weight -1.0 must be finite and not negative"),
    "a weight that is no number": (lambda: LOSSES["dkd"](beta=float("nan")), "beta nan must be finite"),
    "an infinite weight": (lambda: LOSSES["nkd"](gamma=float("inf")), "gamma inf must be finite"),
    "no whole image": (lambda: SDD(scales=(2, 4)), r"scales \[2, 4\] must begin with 1"),
    "a scale of 0": (lambda: SDD(scales=(1, 0)), r"scales \[1, 0\] must be positive"),
    "a scale the cascade lacks": (lambda: SDD(scales=(1, 7), pooling="cascade"), "scale 7 has no cells of its own"),
    "label smoothing": (lambda: CrossEntropy(label_smoothing=1.5), "label_smoothing 1.5 must lie in 0..1"),
    "no teacher": (lambda: LOSSES["kd"]()(OUTPUT, None, Target(LABELS)), "kd compares with a teacher and got none"),
    "rows of the contrast": (lambda: contrastive_loss(ROWS, ROWS[:3], CATEGORIES), "differ; both must have one shape"),
    "maps for rows": (lambda: contrastive_loss(REGIONS, REGIONS, CATEGORIES), "3 dimensions; it must have 2"),
    "too few categories": (lambda: contrastive_loss(ROWS, ROWS, CATEGORIES[:3]), r"categories \[3\] must be \[4\]"),
    "float categories": (lambda: contrastive_loss(ROWS, ROWS, CATEGORIES.float()), "categories are torch.float32"),
    "unknown form": (lambda: contrastive_loss(ROWS, ROWS, CATEGORIES, form="exp"), "form 'exp' is unknown"),
    "unknown precision": (
        lambda: contrastive_loss(ROWS, ROWS, CATEGORIES, precision="bf16"),
        "precision 'bf16' is unknown; choose one of float32, tf32",
    ),
    "no chunk": (lambda: contrastive_loss(ROWS, ROWS, CATEGORIES, chunk_rows=0), "chunk_rows 0 must be at least 1"),
    "contrast's temperature": (lambda: MSDCRD(**FACTS, temperature=0.0), "temperature 0.0 must be positive"),
    "a stage too deep": (lambda: MSDCRD(**FACTS, stages=(-3,)), r"stages \[-3\] must lie in -2..-1"),
    "a stage from the front": (lambda: MSDCRD(**FACTS, stages=(0,)), r"stages \[0\] must lie in -2..-1"),
    "a stage twice": (lambda: MSDCRD(**FACTS, stages=(-1, -1)), "each once"),
    "stages by another name": (lambda: MSDCRD(**FACTS, stages="first"), "stages 'first' must be 'last', 'all' or"),
    "a model without stages": (
        lambda: MSDCRD(facts(4, 8), facts()),
        "compares stages of both models, and one of them has none",
    ),
    "no stages": (lambda: MSDCRD(**FACTS, stages=()), "must be 'last', 'all' or"),
    "no regions": (lambda: MSDCRD(**FACTS, scales=(), windows=()), "scales and windows are both empty"),
    "a stride of 0": (lambda: MSDCRD(**FACTS, windows=(2,), stride=0), "stride 0 must be at least 1"),
    "channels without projector": (lambda: MSDCRD(**FACTS, projector="none"), "leaves 8 channels, the teacher has 9"),
    "unknown projector": (lambda: build_projector("linear", 3, 4), "projector 'linear' is unknown"),
    "an even kernel": (lambda: AttentionProjector(3, 4, kernel_size=2), "kernel_size 2 must be odd"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_requests_are_refused_in_one_line(case):
    refused_in_one_line(*REFUSED[case])


def test_a_window_larger_than_the_teachers_map_is_refused():
    criterion = MSDCRD(facts(3), facts(3), scales=(), windows=(5,), mask_same_category=False, projector="none")
    output = OUTPUT._replace(stages={-1: OUTPUT.feature_map})
    with pytest.raises(ValueError, match="window 5 is larger than the 4 x 4 map"):
        criterion(output, output, Target(LABELS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("base", ["kd", "dkd", "nkd"])
def test_a_value_that_is_no_number_is_never_repaired(base, side, value):
    """It is not looked for, which would make the host wait in every step: it shows in the loss, which the loop stops at."""
    student, teacher = REGIONS.clone(), REGIONS.clone() + 1
    (student if side == "student" else teacher)[0, 1, 2] = value
    student.requires_grad_()
    loss = sdd_loss(student, teacher, LABELS, base)
    assert not loss.isfinite()
    loss.backward()
    assert not student.grad[0].isfinite().all()
    assert student.grad[1].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_contrast_with_a_value_that_is_no_number_is_not_finite(side, value):
    student, teacher = ROWS.clone(), ROWS.clone() + 1
    (student if side == "student" else teacher)[1, 2] = value
    student.requires_grad_()
    for categories in (CATEGORIES, CATEGORIES * 0):
        loss = contrastive_loss(student, teacher, categories)
        assert not loss.isfinite()
        (slope,) = torch.autograd.grad(loss, student)
        assert not slope[1].isfinite().all()


def test_one_class_has_no_divergence():
    assert torch.equal(kd_loss(LOGITS[:, :1], LOGITS[:, 1:2]), torch.zeros(2))
    assert sdd_loss(REGIONS[..., :1], REGIONS[..., 1:2], LABELS * 0) == 0


def test_soft_labels_that_a_loss_does_not_read_are_no_mistake():
    assert LOSSES["kd"]()(OUTPUT, OUTPUT, Target(SOFT))[0] == 0
    assert sdd_loss(REGIONS, REGIONS, SOFT, rule="class") == 0


def test_every_loss_of_the_table_names_itself_where_the_teacher_is_missing():
    for name in ("kd", "dkd", "nkd"):
        with pytest.raises(ValueError, match=f"^{name} compares with a teacher"):
            LOSSES[name]()(OUTPUT, None, Target(LABELS))
    for name, criterion in (("sdd", SDD()), ("msdcrd", MSDCRD(**FACTS))):
        with pytest.raises(ValueError, match=f"^{name} compares with a teacher"):
            criterion(OUTPUT, None, Target(LABELS))
    assert CrossEntropy().teacher_needs is None
    assert LOSSES["kd"]().teacher_needs == Needs(logits=True)
