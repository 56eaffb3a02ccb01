"""What must hold of KD, DKD, NKD and SDD whatever the numbers are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses.logits import dkd_loss, kd_loss, nkd_loss
from distill.losses.sdd import complementary, sdd_loss
from distill.regions import MODES, pool, pooling_matrix
from tests.distill.losses.references import dkd as plain_dkd
from tests.distill.losses.references import kd as plain_kd
from tests.distill.losses.references import nkd as plain_nkd
from tests.distill.losses.references import sdd as plain_sdd

FEW = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)
BASES = ("kd", "dkd", "nkd")
EACH_BASE = pytest.mark.parametrize("base", BASES)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def regions(seed: int, batch: int = 3, cells: int = 5, classes: int = 6, spread: float = 2.0):
    """Random float64 student and teacher region logits [B, R, K] and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, cells, classes, generator=generator, dtype=torch.float64) * spread
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def rows_of(base, student, teacher, labels, **options):
    """The plain loss of each row."""
    if base == "kd":
        return kd_loss(student, teacher, **options)
    return {"dkd": dkd_loss, "nkd": nkd_loss}[base](student, teacher, labels, **options)


def gradient(function, *inputs):
    """The gradient with respect to the first input."""
    first = inputs[0].detach().clone().requires_grad_()
    return torch.autograd.grad(function(first, *inputs[1:]), first)[0]


@FEW
@given(SEEDS, st.integers(2, 9), st.sampled_from([0.5, 1.0, 3.0, 4.0]))
def test_rows_and_gradients_equal_the_straightforward_version(seed, classes, temperature):
    student, teacher, labels = regions(seed, classes=classes)
    own = labels[:, None].expand(student.shape[:2])
    pairs = [
        (lambda s: kd_loss(s, teacher, temperature), lambda s: plain_kd(s, teacher, temperature)),
        (
            lambda s: dkd_loss(s, teacher, own, 0.7, 3.0, temperature),
            lambda s: plain_dkd(s, teacher, own, 0.7, 3.0, temperature),
        ),
        (lambda s: nkd_loss(s, teacher, own, 2.5, temperature), lambda s: plain_nkd(s, teacher, own, 2.5, temperature)),
        (
            lambda s: nkd_loss(s, teacher, own, 2.5, temperature, False),
            lambda s: plain_nkd(s, teacher, own, 2.5, temperature, False),
        ),
    ]
    upstream = torch.linspace(-1, 2, own.numel(), dtype=torch.float64).view_as(own)
    for ours, plain in pairs:
        torch.testing.assert_close(ours(student), plain(student), **CLOSE)
        mine, theirs = (gradient(lambda s, f=f: (f(s) * upstream).sum(), student) for f in (ours, plain))
        torch.testing.assert_close(mine, theirs, **CLOSE)


@EACH_BASE
@FEW
@given(seed=SEEDS)
def test_sdd_equals_the_straightforward_version(base, seed):
    student, teacher, labels = regions(seed)
    own = labels[:, None].expand(student.shape[:2])
    expected = plain_sdd(rows_of(base, student, teacher, own), teacher, labels)
    torch.testing.assert_close(sdd_loss(student, teacher, labels, base), expected, **CLOSE)


@EACH_BASE
@FEW
@given(seed=SEEDS)
def test_one_region_is_the_base_loss(base, seed):
    student, teacher, labels = regions(seed, cells=1)
    expected = rows_of(base, student[:, 0], teacher[:, 0], labels).mean()
    for reduction in ("mean", "sum"):
        assert torch.equal(sdd_loss(student, teacher, labels, base, reduction=reduction), expected)


@EACH_BASE
@FEW
@given(seed=SEEDS, mode=st.sampled_from(MODES), height=st.integers(1, 9), width=st.integers(1, 9))
def test_constant_maps_give_the_base_loss_at_any_scales(base, seed, mode, height, width):
    student, teacher, labels = regions(seed, cells=1)
    maps = [logits[:, 0, :, None, None].expand(-1, -1, height, width) for logits in (student, teacher)]
    matrix = pooling_matrix(height, width, (1, 2, 4), mode)
    pooled = [pool(each, matrix) for each in maps]
    expected = rows_of(base, student[:, 0], teacher[:, 0], labels).mean()
    torch.testing.assert_close(sdd_loss(*pooled, labels, base), expected, **CLOSE)
    torch.testing.assert_close(sdd_loss(*pooled, labels, base, reduction="sum"), 21 * expected, **CLOSE)


@FEW
@given(SEEDS)
def test_agreement_costs_nothing_in_kd_and_dkd_and_the_target_term_in_nkd(seed):
    student, _, labels = regions(seed)
    for base in ("kd", "dkd"):
        assert sdd_loss(student, student, labels, base) == 0
        assert gradient(lambda s, b=base: sdd_loss(s, student, labels, b), student).abs().max() == 0
    assert sdd_loss(student, student, labels, "nkd") > 0
    share = student.softmax(-1)
    one_hot = torch.nn.functional.one_hot(labels, 6).double()[:, None]
    weights = 1.0 + complementary(student, labels, "label").double()
    own = share.gather(-1, labels[:, None, None].expand(-1, 5, 1))
    expected = weights[..., None] * own * (share - one_hot) / (3 * 5)
    actual = gradient(lambda s: sdd_loss(s, student, labels, "nkd"), student)
    torch.testing.assert_close(actual, expected, **CLOSE)


@EACH_BASE
@FEW
@given(seed=SEEDS, mode=st.sampled_from(MODES), side=st.integers(2, 9))
def test_flips_and_transposes_of_both_maps_change_nothing(base, seed, mode, side):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 2, 4, side, side, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (2,), generator=generator)
    matrix = pooling_matrix(side, side, (1, 2, 4), mode)

    def loss(both):
        return sdd_loss(pool(both[0], matrix), pool(both[1], matrix), labels, base)

    expected = loss(maps)
    for changed in (maps.flip(-1), maps.flip(-2), maps.transpose(-1, -2)):
        torch.testing.assert_close(loss(changed), expected, **CLOSE)


@EACH_BASE
@FEW
@given(seed=SEEDS)
def test_regions_may_be_permuted_together_but_not_the_global_one(base, seed):
    student, teacher, labels = regions(seed)
    expected = sdd_loss(student, teacher, labels, base)
    order = torch.tensor([0, 3, 1, 4, 2])
    torch.testing.assert_close(sdd_loss(student[:, order], teacher[:, order], labels, base), expected, **CLOSE)
    assert not torch.isclose(sdd_loss(student[:, order], teacher, labels, base), expected, rtol=1e-9)


@EACH_BASE
def test_another_global_region_is_another_loss(base):
    _, teacher, labels = regions(0, batch=1)
    student = torch.randn(1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher[0, 0, labels[0]] += 50  # right about the whole image, wrong about every region
    teacher[0, 1:, labels[0]] -= 50
    turned = [logits.roll(1, dims=1) for logits in (student, teacher)]
    assert not torch.isclose(sdd_loss(*turned, labels, base), sdd_loss(student, teacher, labels, base), rtol=1e-3)


@EACH_BASE
@FEW
@given(seed=SEEDS)
def test_class_order_and_constants_do_not_matter(base, seed):
    student, teacher, labels = regions(seed)
    expected = sdd_loss(student, teacher, labels, base)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    renamed = torch.argsort(order)[labels]
    torch.testing.assert_close(sdd_loss(student[..., order], teacher[..., order], renamed, base), expected, **CLOSE)
    moved = [logits + torch.randn(3, 5, 1, dtype=torch.float64) for logits in (student, teacher)]
    torch.testing.assert_close(sdd_loss(*moved, labels, base), expected, **CLOSE)
    slopes = gradient(lambda s: sdd_loss(s, teacher, labels, base), student)
    assert slopes.sum(-1).abs().max() <= 1e-14


@EACH_BASE
@FEW
@given(seed=SEEDS)
def test_a_batch_is_the_mean_of_its_images_in_any_order(base, seed):
    student, teacher, labels = regions(seed)
    expected = sdd_loss(student, teacher, labels, base)
    singles = [sdd_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], base) for i in range(3)]
    torch.testing.assert_close(torch.stack(singles).mean(), expected, **CLOSE)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(sdd_loss(student[order], teacher[order], labels[order], base), expected, **CLOSE)


@EACH_BASE
@FEW
@given(seed=SEEDS, weight=st.floats(0, 9))
def test_the_loss_is_affine_in_the_complementary_weight(base, seed, weight):
    student, teacher, labels = regions(seed)

    def loss(beta):
        return sdd_loss(student, teacher, labels, base, complementary_weight=beta)

    own = labels[:, None].expand(3, 5)
    plain = rows_of(base, student, teacher, own).mean()
    torch.testing.assert_close(loss(1.0), plain, **CLOSE)
    torch.testing.assert_close(loss(weight), loss(0.0) + weight * (loss(1.0) - loss(0.0)), **CLOSE)
    assert plain <= loss(2.0) + 1e-12
    assert loss(2.0) <= 2 * plain + 1e-12
    apart = sdd_loss(student, teacher, labels, base, complementary_weight=weight, consistent_weight=0.0)
    torch.testing.assert_close(apart + loss(0.0), loss(weight), **CLOSE)


@FEW
@given(SEEDS, st.sampled_from([1.0, 4.0]), st.integers(4, 9))
def test_kd_gradient_is_the_difference_of_probabilities_spread_by_the_pooling(seed, temperature, side):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 2, 5, side, side, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (2,), generator=generator)
    matrix = pooling_matrix(side, side, (1, 2))
    student, teacher = pool(maps[0], matrix), pool(maps[1], matrix)
    weights = 1.0 + complementary(teacher, labels, "label").double()
    cells = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / (2 * 5)
    cells = cells * weights[..., None]

    def loss(feature_map):
        return sdd_loss(pool(feature_map, matrix), teacher, labels, base_options={"temperature": temperature})

    expected = torch.einsum("rp,brk->bkp", matrix, cells).view_as(maps[0])
    torch.testing.assert_close(gradient(loss, maps[0]), expected, **CLOSE)


@FEW
@given(SEEDS, st.floats(0.1, 8))
def test_scaling_logits_with_the_temperature_scales_kd_by_its_square(seed, temperature):
    student, teacher, _ = regions(seed)
    scaled = kd_loss(student * temperature, teacher * temperature, temperature)
    torch.testing.assert_close(scaled, temperature**2 * kd_loss(student, teacher, 1.0), **CLOSE)


@FEW
@given(SEEDS, st.sampled_from([1.0, 4.0]))
def test_dkd_with_the_teachers_own_weights_is_kd(seed, temperature):
    """KD = TCKD + (1 - p_t[y]) NCKD."""
    student, teacher, labels = regions(seed, cells=1)
    for row in range(3):
        s, t, y = student[row], teacher[row], labels[row : row + 1]
        rest = 1 - (t / temperature).softmax(-1)[0, y[0]].item()
        torch.testing.assert_close(dkd_loss(s, t, y, 1.0, rest, temperature), kd_loss(s, t, temperature), **CLOSE)


@FEW
@given(SEEDS, st.floats(0, 9))
def test_two_classes_leave_nothing_beside_the_target(seed, beta):
    student, teacher, labels = regions(seed, cells=1, classes=2)
    s, t = student[:, 0], teacher[:, 0]
    torch.testing.assert_close(dkd_loss(s, t, labels, 1.0, beta, 4.0), kd_loss(s, t, 4.0), **CLOSE)
    target = -(t.softmax(-1) * s.log_softmax(-1)).gather(-1, labels[:, None]).squeeze(-1)
    torch.testing.assert_close(nkd_loss(s, t, labels, beta, 3.0), target, **CLOSE)


@EACH_BASE
@FEW
@given(seed=SEEDS, mode=st.sampled_from(["area", "adaptive"]))
def test_a_two_by_two_map_repeats_its_cells_at_scale_four(base, seed, mode):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, 2, 4, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (2,), generator=generator)

    def loss(scales):
        matrix = pooling_matrix(2, 2, scales, mode)
        return sdd_loss(pool(maps[0], matrix), pool(maps[1], matrix), labels, base)

    whole = loss((1,))
    torch.testing.assert_close(21 * loss((1, 2, 4)), whole + 5 * (5 * loss((1, 2)) - whole), **CLOSE)


@FEW
@given(SEEDS, st.sampled_from([1.0, 4.0]), st.floats(0.1, 8))
def test_nkd_with_the_target_kept_is_the_target_term_and_kd_and_the_teachers_entropy(seed, temperature, gamma):
    student, teacher, labels = regions(seed, cells=1)
    s, t = student[:, 0], teacher[:, 0]
    target = -(t.softmax(-1) * s.log_softmax(-1)).gather(-1, labels[:, None]).squeeze(-1)
    entropy = torch.distributions.Categorical(logits=t / temperature).entropy()
    expected = target + gamma * (kd_loss(s, t, temperature) + temperature**2 * entropy)
    torch.testing.assert_close(nkd_loss(s, t, labels, gamma, temperature, mask_target=False), expected, **CLOSE)


@EACH_BASE
def test_the_teacher_gets_no_gradient(base):
    student, teacher, labels = regions(3)
    student.requires_grad_()
    teacher.requires_grad_()
    sdd_loss(student, teacher, labels, base).backward()
    assert teacher.grad is None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0


@FEW
@given(SEEDS)
def test_weights_are_one_or_two_and_the_rules_agree_where_the_teacher_is_right(seed):
    _, teacher, labels = regions(seed)
    by_label, by_class = (complementary(teacher, labels, rule) for rule in ("label", "class"))
    assert not by_label[:, 0].any()
    assert not by_class[:, 0].any()
    right = teacher[:, 0].argmax(-1) == labels
    assert torch.equal(by_label[right], by_class[right])
    assert (by_label <= by_class).all()
    alike = teacher[:, :1].expand_as(teacher)
    assert not complementary(alike, labels, "label").any()
    assert not complementary(alike, labels, "class").any()


def test_no_second_derivative_is_pretended():
    student, teacher, labels = regions(1)
    student.requires_grad_()
    (slope,) = torch.autograd.grad(sdd_loss(student, teacher, labels), student, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(scale * sdd_loss(student, teacher, labels), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_gradients_pass_gradcheck():
    student, teacher, labels = regions(2, batch=2, cells=2, classes=4)
    student.requires_grad_()
    own = labels[:, None].expand(2, 2)
    for function in (
        lambda s: kd_loss(s, teacher, 4.0),
        lambda s: dkd_loss(s, teacher, own, 1.0, 8.0, 4.0),
        lambda s: nkd_loss(s, teacher, own, 1.5, 2.0),
        lambda s: nkd_loss(s, teacher, own, 1.5, 2.0, mask_target=False),
    ):
        assert torch.autograd.gradcheck(function, student)
