"""What must hold of the contrastive loss whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses.contrast import round_to_tf32_, tf32_products
from distill.losses.msdcrd import contrast, contrastive_loss, mean_negatives
from tests.distill.losses.references import contrast as plain_contrast

FEW = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)
TEMPERATURES = st.sampled_from([0.005, 0.07, 1.0, 3.0])
FORMS = st.sampled_from(["log", "eq12"])
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def batch(seed: int, rows: int = 12, width: int = 5, categories: int = 4):
    """Random float64 student and teacher rows, not normalised, and categories."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, width, generator=generator, dtype=torch.float64) * 3
    return student, teacher, torch.randint(categories, (rows,), generator=generator)


def value_and_gradient(function, student):
    """The loss and its gradient with respect to the student."""
    student = student.detach().clone().requires_grad_()
    loss = function(student)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def kept_negatives(categories):
    """How many negatives each row keeps."""
    return (categories[:, None] != categories[None, :]).sum(1).double()


@FEW
@given(SEEDS, TEMPERATURES, FORMS, st.booleans(), st.sampled_from([1, 7, 12, 50]))
def test_any_chunk_gives_the_straightforward_value_and_gradient(seed, temperature, form, mask, chunk_rows):
    student, teacher, categories = batch(seed)
    options = {"temperature": temperature, "form": form, "mask_same_category": mask}
    ours = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories, chunk_rows=chunk_rows, **options), student)
    plain = value_and_gradient(lambda s: plain_contrast(s, teacher, categories, **options), student)
    torch.testing.assert_close(ours[0], plain[0], **CLOSE)
    torch.testing.assert_close(ours[1], plain[1], **CLOSE)


@FEW
@given(SEEDS, st.sampled_from([0.07, 1.0, 3.0]))
def test_the_loss_lies_between_what_opposite_and_equal_directions_give(seed, temperature):
    student, teacher, categories = batch(seed)
    kept = kept_negatives(categories)
    loss = contrastive_loss(student, teacher, categories, temperature)
    assert torch.log1p(kept * math.exp(-2 / temperature)).mean() <= loss + 1e-12
    assert loss <= torch.log1p(kept * math.exp(2 / temperature)).mean() + 1e-12


def test_equal_cosines_give_the_log_of_the_candidates():
    student, teacher = torch.ones(6, 3, dtype=torch.float64), torch.ones(6, 3, dtype=torch.float64)
    categories = torch.tensor([0, 0, 1, 1, 1, 2])
    expected = torch.log1p(kept_negatives(categories)).mean()
    torch.testing.assert_close(contrastive_loss(student, teacher, categories), expected, rtol=1e-14, atol=0)


@FEW
@given(SEEDS, TEMPERATURES)
def test_the_printed_form_lies_between_minus_one_and_zero_and_above_jensens_bound(seed, temperature):
    student, teacher, categories = batch(seed)
    printed = contrastive_loss(student, teacher, categories, temperature, form="eq12")
    assert -1 <= printed <= 0
    assert -printed >= torch.exp(-contrastive_loss(student, teacher, categories, temperature)) - 1e-12


@FEW
@given(SEEDS, st.sampled_from([0.07, 1.0]))
def test_the_gradient_of_a_row_is_bounded_and_orthogonal_to_it(seed, temperature):
    student, teacher, categories = batch(seed)
    _, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories, temperature), student)
    bounds = torch.stack(
        [1 - torch.exp(-_row_loss(student, teacher, categories, temperature, row)) for row in range(len(student))]
    )
    assert (gradient.norm(dim=1) <= 2 * bounds / (len(student) * temperature * student.norm(dim=1)) + 1e-15).all()
    assert (gradient * student).sum(1).abs().max() <= 1e-15


def _row_loss(student, teacher, categories, temperature, row):
    """The loss of one row alone: the reference on its row of the matrix."""
    cosines = torch.nn.functional.normalize(student[row], dim=0) @ torch.nn.functional.normalize(teacher, dim=1).T
    kept = categories != categories[row]
    return torch.log1p(torch.exp((cosines[kept] - cosines[row]) / temperature).sum())


@FEW
@given(SEEDS)
def test_masking_lowers_the_loss_and_does_nothing_to_distinct_categories(seed):
    student, teacher, categories = batch(seed)
    masked = contrastive_loss(student, teacher, categories)
    assert masked <= contrastive_loss(student, teacher, categories, mask_same_category=False) + 1e-15
    distinct = torch.arange(len(student))
    torch.testing.assert_close(
        contrastive_loss(student, teacher, distinct),
        contrastive_loss(student, teacher, distinct, mask_same_category=False),
        rtol=1e-14,
        atol=0,
    )


@FEW
@given(SEEDS)
def test_a_row_of_an_absent_category_raises_every_other_rows_loss(seed):
    student, teacher, categories = batch(seed)
    longer = batch(seed + 1, rows=1)
    teacher_longer, categories_longer = torch.cat([teacher, longer[1]]), torch.cat([categories, torch.tensor([99])])
    for row in range(len(student)):
        before = _row_loss(student, teacher, categories, 1.0, row)
        assert _row_loss(student, teacher_longer, categories_longer, 1.0, row) > before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.005])
@pytest.mark.parametrize("rows", [1, 10])
def test_one_category_is_exactly_zero_with_no_gradient(rows, temperature, dtype):
    student, teacher, _ = (each.to(dtype) for each in batch(0, rows=rows))
    categories = torch.full((rows,), 7)
    for form, expected in (("log", 0.0), ("eq12", -1.0)):
        loss, gradient = value_and_gradient(
            lambda s, form=form: contrastive_loss(s, teacher, categories, temperature, form), student
        )
        assert loss == expected
        assert gradient.abs().max() == 0


def test_two_regions_by_hand():
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 1.0], [0.0, 5.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    expected = (math.log1p(math.exp(0 - half)) + math.log1p(math.exp(half - 1))) / 2
    loss = contrastive_loss(student, teacher, torch.tensor([0, 1]))
    torch.testing.assert_close(loss.item(), expected, rtol=1e-14, atol=0)


def test_a_twin_of_the_positive_among_the_negatives_halves_the_likelihood():
    student, teacher, _ = batch(0, rows=6)
    teacher[3:] = teacher[:3]
    loss = contrastive_loss(student, teacher, torch.arange(6))
    assert loss >= math.log(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_dead_region_has_no_direction_and_breaks_nothing(dtype):
    """A zero student vector used to have a gradient of 1e6 and more, which float16 cannot hold."""
    student, teacher, categories = (each.to(dtype) if each.is_floating_point() else each for each in batch(0))
    student[2], teacher[5] = 0, 0
    loss, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student)
    assert loss.isfinite()
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert gradient[2].abs().max() == 0
    assert gradient[5].abs().max() > 0
    alone, _ = contrast(student[2:3], teacher[2:3], torch.zeros(1, dtype=torch.int64))
    assert alone == 0


@FEW
@given(SEEDS, st.integers(-9, 9))
def test_lengths_do_not_matter(seed, exponent):
    student, teacher, categories = batch(seed)
    loss, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student)
    scale = 2.0**exponent
    longer, steeper = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student * scale)
    assert longer == loss
    assert torch.equal(steeper * scale, gradient)
    other, same = value_and_gradient(lambda s: contrastive_loss(s, teacher * scale, categories), student)
    assert other == loss
    assert torch.equal(same, gradient)
    lengths = torch.rand(len(student), 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(contrastive_loss(student * lengths, teacher / lengths, categories), loss, **CLOSE)


@FEW
@given(SEEDS)
def test_order_and_names_do_not_matter(seed):
    student, teacher, categories = batch(seed)
    loss, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student)
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(seed))
    moved = value_and_gradient(lambda s: contrastive_loss(s, teacher[order], categories[order]), student[order])
    torch.testing.assert_close(moved[0], loss, **CLOSE)
    torch.testing.assert_close(moved[1], gradient[order], **CLOSE)
    names = torch.tensor([901, -7, 3, 40])
    assert contrastive_loss(student, teacher, names[categories]) == loss


@FEW
@given(SEEDS)
def test_one_rotation_of_both_changes_nothing(seed):
    student, teacher, categories = batch(seed)
    rotation = torch.linalg.qr(batch(seed + 1, rows=5)[0]).Q
    loss, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student)
    turned = value_and_gradient(lambda s: contrastive_loss(s, teacher @ rotation, categories), student @ rotation)
    torch.testing.assert_close(turned[0], loss, **CLOSE)
    torch.testing.assert_close(turned[1], gradient @ rotation, **CLOSE)


def test_it_does_depend_on_the_batch_and_on_who_is_who_and_student_as_teacher_is_no_minimum():
    student, teacher, categories = batch(4)
    loss = contrastive_loss(student, teacher, categories)
    assert contrastive_loss(student[:6], teacher[:6], categories[:6]) < loss
    assert not torch.isclose(contrastive_loss(teacher, student, categories), loss, rtol=1e-6)
    same, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), teacher)
    assert same > 0
    assert gradient.abs().max() > 1e-3


def test_the_optimum_is_the_centred_teacher():
    """At temperature 1 the gradient pulls to the own teacher less the mean negative, not to the teacher itself."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(60, 16, generator=generator, dtype=torch.float64).clamp_min(0) + 0.5
    student = torch.randn(60, 16, generator=generator, dtype=torch.float64).requires_grad_()
    categories = torch.arange(60)
    optimizer = torch.optim.LBFGS([student], max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = contrastive_loss(student, teacher, categories)
        loss.backward()
        return loss

    optimizer.step(closure)
    unit = torch.nn.functional.normalize(teacher, dim=1)
    centred = unit - (unit.sum(0) - unit) / 59
    reached = torch.nn.functional.cosine_similarity(student.detach(), centred)
    itself = torch.nn.functional.cosine_similarity(student.detach(), unit)
    assert reached.min() > 0.99
    assert itself.mean() < 0.9


def test_gradient_of_the_log_form_is_about_n_times_that_of_the_printed_one():
    student, teacher, _ = batch(0, rows=256, width=16)
    categories = torch.arange(256)
    slopes = [
        value_and_gradient(lambda s, f=form: contrastive_loss(s, teacher, categories, form=f), student)[1]
        for form in ("log", "eq12")
    ]
    assert 200 < slopes[0].norm() / slopes[1].norm() < 310


def test_the_teacher_gets_no_gradient():
    student, teacher, categories = batch(0)
    student.requires_grad_()
    teacher.requires_grad_()
    contrastive_loss(student, teacher, categories).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_gradient_passes_gradcheck():
    student, teacher, categories = batch(0, rows=5)
    for form in ("log", "eq12"):
        for temperature in (0.02, 1.0):
            assert torch.autograd.gradcheck(
                lambda s, f=form, t=temperature: contrastive_loss(s, teacher, categories, t, f, chunk_rows=2),
                student.requires_grad_(),
            )


def test_accumulating_and_scaling_gradients_compose():
    student, teacher, categories = batch(0)
    _, gradient = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student)
    student.requires_grad_()
    loss = contrastive_loss(student, teacher, categories)
    (loss * 1024).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 1025 * gradient, rtol=1e-14, atol=0)


def test_loss_scale_reaches_float16_before_the_gradient_is_rounded():
    """Unscaled, these gradients lie near float16's smallest numbers; scaled as a GradScaler does, they keep their digits."""
    student, teacher, categories = batch(0, rows=400, width=64)
    _, exact = value_and_gradient(lambda s: contrastive_loss(s, teacher, categories), student.half().double() * 64)
    low = (student.half() * 64).requires_grad_()
    (contrastive_loss(low, teacher, categories) * 65536).backward()
    assert (low.grad.double() / 65536 - exact).norm() <= 2e-3 * exact.norm()


def test_related_cosine_and_negatives_are_reported():
    student, teacher, categories = batch(0)
    _, cosine = contrast(student.requires_grad_(), teacher, categories, chunk_rows=5)
    expected = torch.nn.functional.cosine_similarity(student, teacher).mean()
    torch.testing.assert_close(cosine, expected.detach(), rtol=1e-12, atol=0)
    assert not cosine.requires_grad
    assert mean_negatives(categories, True) == kept_negatives(categories).mean().float()
    assert mean_negatives(categories, False) == len(student) - 1


def test_evaluation_makes_no_gradient():
    student, teacher, categories = batch(0)
    leaf = student.clone().requires_grad_()
    with torch.no_grad():
        loss = contrastive_loss(leaf, teacher, categories)
    assert not loss.requires_grad
    assert loss == contrastive_loss(leaf, teacher, categories).detach()
    assert not contrastive_loss(student, teacher, categories).requires_grad


def test_evaluation_does_not_multiply_for_a_gradient():
    """Two products of N x N x D with a gradient, one without; counted, not timed."""
    student, teacher, categories = batch(0, rows=64)
    leaf = student.clone().requires_grad_()
    counts = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), torch.profiler.profile() as profile:
            contrastive_loss(leaf, teacher, categories, chunk_rows=16)
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::mm"))
    assert counts == [8, 4]


def cut_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """What a tensor core that rounds nothing sees of a float32."""
    return (values.contiguous().view(torch.int32) & -0x2000).view(torch.float32)


def test_a_float_is_rounded_to_the_nearest_of_ten_bits_and_its_kind_stays():
    values = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-10, -1 - 0.9 * 2**-11, 2 - 2**-23, 0.0, torch.inf, 3e-39])
    assert round_to_tf32_(values.clone()).tolist()[:7] == [1, 1 + 2**-10, 1 + 2**-10, -1, 2, 0, torch.inf]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=generator)
    rounded = round_to_tf32_(values.clone())
    assert ((rounded - values).abs() <= 2**-11 * values.abs()).all()
    assert torch.equal(cut_to_tf32(rounded), rounded), "a tensor core that cuts bits off loses nothing of it"
    exact = values.double()
    assert torch.equal(round_to_tf32_(exact.clone()), exact)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("form", ["log", "eq12"])
@pytest.mark.parametrize("positive", [False, True], ids=["any sign", "non-negative, as after a ReLU"])
def test_operands_in_tf32_change_the_gradient_by_a_fifty_thousandth_over_the_temperature(
    positive: bool, form: str, temperature: float, monkeypatch: pytest.MonkeyPatch
):
    """On tensor cores that cut the lower bits off too: without rounding, non-negative features lose 4e-4 of the gradient."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 672, 256, generator=generator)
    if positive:
        student, teacher = student.relu(), teacher.relu()
    categories = torch.randint(100, (672,), generator=generator)

    def evaluated(student, teacher, precision):
        return value_and_gradient(
            lambda s: contrastive_loss(s, teacher, categories, temperature, form, precision=precision), student
        )

    exact = evaluated(student.double(), teacher.double(), "float32")
    plain = evaluated(student, teacher, "float32")
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: product(cut_to_tf32(a), cut_to_tf32(b)))
    loss, gradient = evaluated(student, teacher, "tf32")
    assert (loss - exact[0]).abs() <= 3e-6 / temperature * exact[0].abs()
    assert (gradient - exact[1]).norm() <= 2e-5 / temperature * exact[1].norm()
    assert 10 * (plain[1] - exact[1]).norm() < (gradient - exact[1]).norm(), "something was rounded"


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF], ids=["a CPU's NaN", "a GPU's NaN"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_is_not_a_number_is_seen_in_the_loss_through_tf32_too(whose: str, bits: int):
    student, teacher, categories = (each.float() if each.is_floating_point() else each for each in batch(0))
    (student if whose == "student" else teacher).view(torch.int32)[3, 2] = bits
    assert contrastive_loss(student, teacher, categories, precision="tf32").isnan()


def test_the_switch_of_tf32_is_on_for_the_products_of_a_gpu_only_and_is_put_back():
    before = torch.backends.cuda.matmul.allow_tf32
    for device, wanted, inside in (("cuda", True, True), ("cuda", False, before), ("cpu", True, before)):
        with tf32_products(torch.device(device), wanted):
            assert torch.backends.cuda.matmul.allow_tf32 is inside
        assert torch.backends.cuda.matmul.allow_tf32 is before
