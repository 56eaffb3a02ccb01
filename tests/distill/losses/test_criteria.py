"""The criteria say what they need, compute what the functions compute, and report what they promise."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import typing
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy as TimmBinary

from distill.losses import LOSSES
from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.losses.msdcrd import MSDCRD, contrastive_loss
from distill.losses.projector import AttentionProjector, build_projector
from distill.losses.sdd import SDD, sdd_loss
from distill.protocols import Criterion, Needs, Regions, Target
from distill.regions import pool, region_matrix
from tests.distill.losses.outputs import FACTS, facts, made, model_output

LABELS = torch.tensor([0, 3, 5, 1])
SOFT = torch.softmax(torch.arange(24.0).view(4, 6) % 7, dim=1)
VARIANTS = [
    ("cross_entropy", {}),
    ("kd", {}),
    ("dkd", {}),
    ("nkd", {}),
    ("sdd", {"base": "kd"}),
    ("sdd", {"base": "dkd", "scales": (1, 2, 4), "pooling": "cascade", "rule": "class"}),
    ("sdd", {"base": "nkd", "scales": (1, 3), "pooling": "adaptive", "reduction": "sum", "mask_target": False}),
    ("msdcrd", {}),
    ("msdcrd", {"stages": "last", "windows": (3, 2), "stride": 2, "temperature": 0.1}),
    ("msdcrd", {"stages": (-2,), "scales": (), "windows": (7, 4), "projector": "1x1"}),
    ("msdcrd", {"scales": (1,), "mask_same_category": False, "form": "eq12"}),
    ("msdcrd", {"categories": "labels", "windows": (3,)}),
    ("kd", {"standardise": True}),
    ("sdd", {"base": "nkd", "standardise": True}),
    ("cat_kd", {}),
    ("cat_kd", {"resolution": 4, "normalise": True}),
    ("ctkd", {}),
    ("ctkd", {"base": "dkd", "standardise": True}),
    ("mlkd", {}),
    ("mlkd", {"temperature": 2.0, "standardise": True, "mended": True}),
    ("mgd", {"mask_ratio": 0.0}),
    ("reviewkd", {}),
    ("reviewkd", {"student_preactivations": True}),
    ("ofd", {}),
    ("ofd", {"stages": (-1,), "margins": "measured", "kernel_size": 3}),
    ("fitnet", {}),
    ("fitnet", {"source": "blocks", "pair": (0, -2), "match": "pool", "relu": False}),
    ("at", {}),
    ("at", {"source": "blocks", "pairs": ((0, 1), (-1, -1)), "power": 4}),
    ("sp", {}),
    ("sp", {"source": "blocks"}),
    ("sp", {"scales": (1, 2, 4), "pooling": "cascade"}),
    ("sp", {"scales": (1, 2), "reading": "vector"}),
    ("sp", {"scales": (2,), "reading": "rows"}),
    ("pkt", {}),
    ("rkd", {}),
    ("dist", {}),
    ("dist", {"temperature": 4.0, "beta": 2.0}),
    ("crd", {"embedding": 5, "negatives": 7}),
    ("crd", {"mode": "relax", "temperature": 0.5, "momentum": 0.9}),
    ("wcord", {"embedding": 5, "negatives": 7}),
    ("wkd_logit", {}),
    ("wkd_feature", {}),
    ("wkd_feature", {"source": "blocks", "projector": "1x1", "grid": 2}),
    ("sdd", {"reliability": "confidence"}),
]
TRAINED = ("msdcrd", "fitnet", "mgd", "reviewkd", "ofd", "crd", "wcord", "wkd_feature")
"""Losses with a network of their own, which follows autocast."""
EACH_VARIANT = pytest.mark.parametrize(("name", "options"), VARIANTS)


def build(name: str, options: dict) -> torch.nn.Module:
    """The criterion of this name."""
    return made(name, **options)


def target() -> Target:
    """All that a run says of the four images, the same draws each time."""
    ids, plain = torch.tensor([6, 9, 5, 1]), torch.tensor([True, False, True, False])
    return Target(LABELS, ids, generator=torch.Generator().manual_seed(0), plain=plain)


def outputs(criterion, **changes):
    """Student and teacher outputs that serve the criterion."""
    teacher_needs = criterion.teacher_needs or Needs()
    return model_output("student", criterion.student_needs, **changes), model_output("teacher", teacher_needs, **changes)


@EACH_VARIANT
def test_a_criterion_gives_a_scalar_with_gradient_and_detached_statistics(name, options):
    criterion = build(name, options)
    assert isinstance(criterion, Criterion)
    student, teacher = outputs(criterion)
    loss, statistics = criterion(student, teacher, target())
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    used = [*student.stages.values(), *student.blocks.values(), *student.preactivations.values()] or [student.feature_map]
    assert all(feature_map.grad.isfinite().all() and feature_map.grad.abs().max() > 0 for feature_map in used)
    assert all(value.shape == () and not value.requires_grad and value.isfinite() for value in statistics.values())
    assert all(parameter.grad is not None for parameter in criterion.parameters())


@EACH_VARIANT
def test_no_gradient_reaches_the_teacher(name, options):
    criterion = build(name, options)
    student, teacher = outputs(criterion)
    maps = (teacher.region_logits, teacher.region_features, teacher.stages, teacher.blocks, teacher.preactivations)
    wanting = [teacher.logits, teacher.feature_map, *(tensor for each in maps for tensor in each.values())]
    wanting += [] if teacher.embedding is None else [teacher.embedding]
    for tensor in wanting:
        tensor.requires_grad_()
    criterion(student, teacher, target())[0].backward()
    assert all(tensor.grad is None for tensor in wanting)


@pytest.mark.parametrize(("name", "options"), [variant for variant in VARIANTS if variant[0] not in TRAINED])
def test_bfloat16_outputs_under_autocast_lose_only_their_own_rounding(name, options):
    _check_bfloat16(build(name, options))


@pytest.mark.parametrize("form", ["log", "eq12"])
def test_msdcrd_behind_its_projector_computes_in_float32_under_autocast(form):
    """The projector is a network and follows autocast; without one, nothing but the outputs' own rounding is lost."""
    _check_bfloat16(MSDCRD(facts(8), facts(8), form=form, windows=(3,), projector="none"))


def _check_bfloat16(criterion):
    student, teacher = outputs(criterion, dtype=torch.bfloat16)
    if isinstance(criterion, MSDCRD):
        teacher = teacher._replace(stages={-1: teacher.feature_map[:, :8]})
    expected = criterion(_as_double(student), _as_double(teacher), target())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(student, teacher, target())[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)


def _as_double(output):
    """The same output with every tensor in float64."""
    return output._replace(
        logits=output.logits.detach().double(),
        feature_map=output.feature_map.detach().double(),
        region_logits={key: value.detach().double() for key, value in output.region_logits.items()},
        region_features={key: value.detach().double() for key, value in output.region_features.items()},
        stages={key: value.detach().double() for key, value in output.stages.items()},
        blocks={key: value.detach().double() for key, value in output.blocks.items()},
        embedding=None if output.embedding is None else output.embedding.detach().double(),
        head_bias=None if output.head_bias is None else output.head_bias.double(),
    )


@EACH_VARIANT
def test_criteria_can_be_copied_and_sent_to_another_process(name, options):
    criterion = build(name, options)
    twins = (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)))
    student, teacher = outputs(criterion)
    expected = criterion(student, teacher, target())[0]
    for twin in twins:
        assert twin(student, teacher, target())[0] == expected


@pytest.mark.parametrize("name", LOSSES)
def test_every_option_has_a_type_and_a_line_of_help(name):
    hints = typing.get_type_hints(LOSSES[name].__init__)
    for parameter in inspect.signature(LOSSES[name]).parameters:
        assert parameter in hints
        assert f"        {parameter}: " in LOSSES[name].__doc__


def test_cross_entropy_is_pytorchs_for_hard_and_soft_labels():
    student, _ = outputs(build("cross_entropy", {}))
    for labels in (LABELS, LABELS.int(), SOFT, SOFT.double()):
        expected = F.cross_entropy(
            student.logits, labels.float() if labels.is_floating_point() else labels.long(), label_smoothing=0.1
        )
        torch.testing.assert_close(build("cross_entropy", {"label_smoothing": 0.1})(student, None, Target(labels))[0], expected)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("summed", [False, True])
def test_binary_cross_entropy_is_timms(threshold: float | None, summed: bool):
    student, _ = outputs(build("cross_entropy", {}))
    options = {"binary": True, "threshold": threshold, "sum_classes": summed}
    for labels, smoothing in ((LABELS, 0.0), (LABELS, 0.1), (SOFT, 0.0)):
        theirs = TimmBinary(smoothing, target_threshold=threshold, sum_classes=summed)
        found = build("cross_entropy", {**options, "label_smoothing": smoothing})(student, None, Target(labels))[0]
        torch.testing.assert_close(found, theirs(student.logits, labels))


def test_smoothing_mixed_labels_is_mixing_smoothed_ones():
    """timm smooths in Mixup, and its binary loss leaves soft labels alone."""
    student, _ = outputs(build("cross_entropy", {}))
    mixed = 0.7 * F.one_hot(LABELS, student.logits.shape[-1]) + 0.3 * F.one_hot(LABELS.flip(0), student.logits.shape[-1])
    smoothed = mixup_target(LABELS, student.logits.shape[-1], lam=0.7, smoothing=0.1)
    ours = build("cross_entropy", {"binary": True, "label_smoothing": 0.1})(student, None, Target(mixed))[0]
    torch.testing.assert_close(ours, TimmBinary(0.0)(student.logits, smoothed))


def test_a_wrong_label_is_an_error_of_the_binary_form_too():
    student, _ = outputs(build("cross_entropy", {}))
    with pytest.raises(ValueError, match="-100"):
        build("cross_entropy", {"binary": True})(student, None, Target(torch.full_like(LABELS, -100)))


def test_classes_take_the_batch_mean_of_the_functions():
    student, teacher = (model_output(side, Needs()) for side in ("student", "teacher"))
    pairs = [
        ("kd", {"temperature": 2.0}, kd_loss(student.logits, teacher.logits, 2.0)),
        ("dkd", {"beta": 2.0}, dkd_loss(student.logits, teacher.logits, LABELS, 1.0, 2.0, 4.0)),
        ("nkd", {"gamma": 0.5}, nkd_loss(student.logits, teacher.logits, LABELS, 0.5, 1.0)),
        ("nkd", {"mask_target": False}, nkd_loss(student.logits, teacher.logits, LABELS, 1.5, 1.0, False)),
    ]
    for name, options, rows in pairs:
        assert build(name, options)(student, teacher, Target(LABELS))[0] == rows.mean()


def test_defaults_of_functions_and_classes_are_the_same():
    for name, function in (("kd", kd_loss), ("dkd", dkd_loss), ("nkd", nkd_loss)):
        taken = inspect.signature(function).parameters
        for option, parameter in inspect.signature(LOSSES[name]).parameters.items():
            assert parameter.default == taken[option].default


def test_sdd_adds_up_and_reports_its_parts():
    for reduction in ("mean", "sum"):
        criterion = SDD(base="dkd", scales=(1, 2, 4), complementary_weight=3.0, reduction=reduction, beta=2.0)
        student, teacher = outputs(criterion)
        loss, found = criterion(student, teacher, Target(LABELS))
        regions = Regions((1, 2, 4), "area")
        mine, theirs = student.region_logits[regions], teacher.region_logits[regions]
        expected = sdd_loss(mine, theirs, LABELS, "dkd", 3.0, reduction=reduction, base_options={"beta": 2.0})
        assert loss == expected
        torch.testing.assert_close(found["consistent_loss"] + 3 * found["complementary_loss"], loss.detach())
        right = theirs.argmax(-1) == LABELS[:, None]
        assert found["complementary_share"] == (right != right[:, :1]).float().mean()
        rows = dkd_loss(mine, theirs, LABELS[:, None].expand(4, 21), beta=2.0).detach()
        torch.testing.assert_close(found["loss_scale_1"], rows[:, 0].mean())
        torch.testing.assert_close(found["loss_scale_4"], rows[:, 5:].mean())


def test_soft_labels_take_the_class_rule_and_say_so_once(caplog):
    from distill.losses.sdd import _noted_class_rule

    _noted_class_rule.cache_clear()
    asked, default = SDD(rule="class"), SDD()
    student, teacher = outputs(default)
    with caplog.at_level(logging.WARNING):
        expected = asked(student, teacher, Target(SOFT))[0]
        assert not caplog.records
        assert default(student, teacher, Target(SOFT))[0] == expected
        assert default(student, teacher, Target(SOFT))[0] == expected
    assert ["rule 'class'" in record.message for record in caplog.records] == [True]


def test_soft_labels_count_as_their_largest_class_in_nkd():
    student, teacher = (model_output(side, Needs()) for side in ("student", "teacher"))
    hard = nkd_loss(student.logits, teacher.logits, SOFT.argmax(1))
    assert torch.equal(nkd_loss(student.logits, teacher.logits, SOFT), hard)
    assert torch.equal(
        nkd_loss(student.logits, teacher.logits, F.one_hot(LABELS, 6).float()), nkd_loss(student.logits, teacher.logits, LABELS)
    )


def test_msdcrd_is_the_plain_sum_over_stages_of_projected_and_pooled_maps():
    criterion = MSDCRD(**FACTS, windows=(3,))
    student, teacher = outputs(criterion)
    loss, found = criterion(student, teacher, Target(LABELS))
    regions = Regions((1, 2, 4), "area", (3,))
    categories = teacher.region_logits[regions].argmax(-1).flatten()
    assert criterion.stages == (-1, -2, -3)
    total = 0
    for stage, projector in zip(criterion.stages, criterion.projectors, strict=True):
        mine, theirs = projector(student.stages[stage]), teacher.stages[stage]
        rows = [pool(each, region_matrix(*each.shape[-2:], regions, (7, 7))).flatten(0, 1) for each in (mine, theirs)]
        expected = contrastive_loss(*rows, categories)
        torch.testing.assert_close(found[f"stage{stage}/loss"], expected.detach())
        cosine = F.cosine_similarity(*rows).mean().detach()
        torch.testing.assert_close(found[f"stage{stage}/related_cosine"], cosine)
        kept = (categories[:, None] != categories).sum(1).float().mean()
        torch.testing.assert_close(found[f"stage{stage}/negatives"], kept)
        total = total + expected
    torch.testing.assert_close(loss, total)


def test_a_term_of_weight_0_leaves_the_cross_entropys_gradient_bit_for_bit():
    slopes = []
    for criterion in (None, MSDCRD(**FACTS), SDD(base="nkd")):
        needs = criterion.student_needs if criterion else Needs()
        student = model_output("student", Needs(needs.region_logits, (), (-1, *needs.stages)))
        loss = build("cross_entropy", {})(student, None, Target(LABELS))[0]
        if criterion is not None:
            loss = loss + 0.0 * criterion(student, model_output("teacher", criterion.teacher_needs), Target(LABELS))[0]
        slopes.append(torch.autograd.grad(loss, student.feature_map)[0])
    assert torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[0], slopes[2])


def test_msdcrd_pairs_stages_from_the_end():
    criterion = MSDCRD(**FACTS, stages=(-3, -1))
    widths = [(p.reduce[0].in_channels, p.expand[0].out_channels) for p in criterion.projectors]
    assert widths == [(4, 5), (8, 12)]
    assert criterion.student_needs == Needs(stages=(-3, -1))
    assert criterion.teacher_needs == Needs(region_logits=(Regions((1, 2, 4)),), stages=(-3, -1))
    assert MSDCRD(**FACTS, stages="last").stages == (-1,)


@pytest.mark.parametrize("windows", [(), (3,)])
def test_msdcrd_can_take_each_images_own_label_as_the_category_of_its_regions(windows):
    """The same as a teacher that gives every region the label of its image; then nothing of its classifier is read."""
    by_teacher, by_labels = (MSDCRD(**FACTS, windows=windows, categories=each) for each in ("teacher", "labels"))
    by_labels.load_state_dict(by_teacher.state_dict())
    assert by_labels.teacher_needs == Needs(stages=by_teacher.stages)
    assert (by_teacher.accepts_soft_labels, by_labels.accepts_soft_labels) == (True, False)
    student, teacher = (model_output(side, getattr(by_teacher, f"{side}_needs")) for side in ("student", "teacher"))
    logits = {regions: F.one_hot(LABELS, 6)[:, None].expand(each.shape) for regions, each in teacher.region_logits.items()}
    wanted, statistics = by_teacher(student, teacher._replace(region_logits=logits), Target(LABELS))
    found, restated = by_labels(student, teacher._replace(region_logits={}), Target(LABELS))
    assert found == wanted
    assert restated == statistics


def test_msdcrd_says_what_to_choose_where_the_teacher_has_no_classifier():
    headless = replace(FACTS["teacher"], num_classes=0)
    with pytest.raises(ValueError, match=r"this teacher has none; set categories to labels, or mask_same_category to false"):
        MSDCRD(FACTS["student"], headless)
    for options in ({"categories": "labels"}, {"mask_same_category": False}):
        assert MSDCRD(FACTS["student"], headless, **options).teacher_needs.region_logits == ()


def test_msdcrd_leaves_out_scales_that_only_repeat_cells():
    """MobileNetV2 on CIFAR ends at 2 x 2, its teacher at 8 x 8: sixteen cells of the former would be four, each four times."""
    criterion = MSDCRD(**FACTS, stages="last")
    changes = {"student": (8, 4, 2), "teacher": (32, 16, 8, 8)}
    student = model_output("student", criterion.student_needs, grids=changes["student"])
    teacher = model_output("teacher", criterion.teacher_needs, grids=changes["teacher"])
    _, found = criterion(student, teacher, Target(LABELS))
    categories = teacher.region_logits[Regions((1, 2, 4))].argmax(-1)[:, :5].flatten()
    assert found["stage-1/negatives"] == (categories[:, None] != categories).sum(1).float().mean()
    only_large = MSDCRD(**FACTS, stages="last", scales=(4,))
    teacher = model_output("teacher", only_large.teacher_needs, grids=changes["teacher"])
    with pytest.raises(ValueError, match=r"scales \[4\] are all larger than a \(2, 2\) map"):
        only_large(student, teacher, Target(LABELS))


def test_msdcrd_takes_oblong_maps_of_different_sizes():
    criterion = MSDCRD(**FACTS)
    student = model_output("student", criterion.student_needs, grids=((20, 24), (10, 12), (5, 6)))
    teacher = model_output("teacher", criterion.teacher_needs, grids=((24, 36), (12, 18), (6, 9), (6, 9)))
    assert criterion(student, teacher, Target(LABELS))[0].isfinite()


def test_ablation_switches_are_the_rows_of_the_papers_table_4():
    """CL: whole images, no mask; CL+MSP: regions, no mask; CL+MSP+SC: regions and mask. Each is the plain function's."""
    for scales, mask in (((1,), False), ((1, 2, 4), False), ((1, 2, 4), True)):
        criterion = MSDCRD(facts(12), facts(12), stages="last", scales=scales, mask_same_category=mask, projector="none")
        assert criterion.teacher_needs == Needs(region_logits=(Regions(scales),) if mask else (), stages=(-1,))
        teacher = model_output("teacher", Needs(region_logits=(Regions(scales),), stages=(-1,)))
        student = model_output("teacher", criterion.student_needs, seed=9)
        rows = [pool(each.feature_map, region_matrix(7, 7, Regions(scales))).flatten(0, 1) for each in (student, teacher)]
        categories = teacher.region_logits[Regions(scales)].argmax(-1).flatten()
        expected = contrastive_loss(*rows, categories, mask_same_category=mask)
        assert criterion(student, teacher, Target(LABELS))[0] == expected


@pytest.mark.parametrize(
    ("student", "teacher", "count"),
    [(64, 64, 41281), (256, 256, 656641), (128, 256, 312321), (960, 256, 1672961), (464, 256, 1286049)],
)
def test_attention_projector_has_the_papers_parameters(student, teacher, count):
    assert sum(p.numel() for p in AttentionProjector(student, teacher).parameters()) == count


def test_projectors_convolutions_begin_as_reviewkds():
    """kaiming_uniform with a = 1 reaches sqrt(3 / inputs of a cell), PyTorch's default 1 / sqrt of it."""
    projector = AttentionProjector(64, 128)
    for convolution in (projector.reduce[0], projector.expand[0]):
        inputs = convolution.weight[0].numel()
        assert 0.98 * (3 / inputs) ** 0.5 < convolution.weight.abs().max() <= (3 / inputs) ** 0.5
        assert convolution.bias is None


@pytest.mark.parametrize("kind", ["attention", "1x1", "1x1-1x1", "1x1-3x3-1x1", "none"])
def test_projectors_keep_the_map_and_give_the_teachers_channels(kind):
    student = 10 if kind == "none" else 6
    projector = build_projector(kind, student, 10)
    assert projector(torch.randn(2, student, 5, 7)).shape == (2, 10, 5, 7)
    kernels = [m.kernel_size[0] for m in projector.modules() if isinstance(m, torch.nn.Conv2d)]
    expected = {"attention": [1, 3, 1], "1x1": [1], "1x1-1x1": [1, 1], "1x1-3x3-1x1": [1, 3, 1], "none": []}
    assert kernels == expected[kind]


def test_the_gate_weighs_cells_but_cancels_in_a_region_of_one_cell():
    projector = AttentionProjector(6, 10, kernel_size=1)
    feature_map = torch.randn(4, 6, 7, 7)
    for scales, moves in (((7,), False), ((2,), True)):
        projector.zero_grad()
        rows = pool(projector(feature_map), region_matrix(7, 7, Regions(scales))).flatten(0, 1)
        contrastive_loss(rows, torch.randn(len(rows), 10), torch.arange(len(rows))).backward()
        slope, others = projector.gate.weight.grad.abs().max(), projector.expand[0].weight.grad.abs().max()
        assert (slope > 1e-4 * others) == moves


def test_statistics_of_a_criterion_are_the_same_when_it_does_not_train():
    for name, options in VARIANTS:
        criterion = build(name, options)
        twin = copy.deepcopy(criterion)
        student, teacher = outputs(criterion)
        loss, found = criterion(student, teacher, target())
        with torch.no_grad():
            again, refound = twin(student, teacher, target())
        assert again == loss
        assert refound == found
