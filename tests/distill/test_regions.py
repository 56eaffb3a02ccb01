"""Regions are averages over the parts of the map that their names say, whatever its size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.losses.sdd import complementary
from distill.protocols import Regions
from distill.regions import (
    MODES,
    _opaque_matrix,
    cached_matrix,
    pool,
    pooling_matrix,
    region_matrix,
    scale_slices,
    usable_scales,
    window_matrix,
)

SIDES = st.integers(1, 15)
SCALES = st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True)
FEW = settings(max_examples=40, deadline=None, derandomize=True)


@FEW
@given(SIDES, SIDES, SCALES, st.sampled_from(MODES))
def test_every_region_is_an_average(height, width, scales, mode):
    matrix = pooling_matrix(height, width, scales, mode)
    assert matrix.shape == (sum(scale**2 for scale in scales), height * width)
    assert matrix.dtype == torch.float64
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-14)


@FEW
@given(SIDES, SIDES, st.integers(1, 6))
def test_adaptive_is_pytorchs_adaptive_average_pooling(height, width, scale):
    feature_map = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(feature_map, scale).flatten(2)
    actual = feature_map.flatten(2) @ pooling_matrix(height, width, [scale], "adaptive").T
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@FEW
@given(SIDES, SIDES, st.integers(1, 4))
def test_cascade_is_the_released_codes_pooling(height, width, scale):
    feature_map = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(feature_map, 4), scale).flatten(2)
    actual = feature_map.flatten(2) @ pooling_matrix(height, width, [scale], "cascade").T
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@FEW
@given(SIDES, SIDES, st.integers(1, 9))
def test_area_partitions_the_image(height, width, scale):
    """Each pixel is shared out among the cells once: the mean of the cells' weights is the mean over the image."""
    cells = pooling_matrix(height, width, [scale])
    torch.testing.assert_close(cells.mean(0), torch.full((height * width,), 1 / (height * width), dtype=torch.float64))


@FEW
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4))
def test_area_gives_teacher_and_student_the_same_regions(side, factor, scale):
    """A map and its enlargement by whole pixels have the same area regions, which adaptive windows do not."""
    small = torch.randn(1, 1, side, side, dtype=torch.float64)
    large = small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    matrices = [pooling_matrix(grid, grid, [scale]) for grid in (side, side * factor)]
    torch.testing.assert_close(*(m.flatten(2) @ matrix.T for m, matrix in zip((small, large), matrices, strict=True)))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 4), (12, 16)])
def test_the_poolings_agree_where_four_divides_both_sides(height, width):
    matrices = [pooling_matrix(height, width, (1, 2, 4), mode) for mode in MODES]
    torch.testing.assert_close(matrices[0], matrices[1], rtol=0, atol=1e-15)
    torch.testing.assert_close(matrices[0], matrices[2], rtol=0, atol=1e-15)


def test_the_cascades_whole_image_of_seven_rows_is_not_their_mean():
    row = torch.tensor([0.125, 5 / 24, 1 / 12, 1 / 6, 1 / 12, 5 / 24, 0.125], dtype=torch.float64)
    torch.testing.assert_close(pooling_matrix(7, 7, [1], "cascade"), torch.outer(row, row).reshape(1, 49))
    torch.testing.assert_close(pooling_matrix(7, 7, [1]), torch.full((1, 49), 1 / 49, dtype=torch.float64))


def test_whole_image_in_area_mode_is_exactly_uniform_on_common_maps():
    for side in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 28, 56):
        assert pooling_matrix(side, side, [1]).unique().numel() == 1


def test_regions_come_scale_by_scale_and_row_by_row():
    matrix = pooling_matrix(4, 4, (1, 2, 4))
    assert scale_slices((1, 2, 4)) == {1: slice(0, 1), 2: slice(1, 5), 4: slice(5, 21)}
    assert torch.equal(matrix[2].view(4, 4)[:2, 2:], torch.full((2, 2), 0.25, dtype=torch.float64))
    assert torch.equal(matrix[5:], torch.eye(16, dtype=torch.float64))
    assert torch.equal(pooling_matrix(4, 4, (4, 1))[:16], matrix[5:])


@pytest.mark.parametrize(("windows", "regions"), [((7, 4, 2), 53), ((7, 5, 3, 1), 84), ((7, 6, 5, 4, 3, 2, 1), 140)])
def test_sliding_windows_are_average_pooling(windows, regions):
    feature_map = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    expected = torch.cat([F.avg_pool2d(feature_map, size, stride=1).flatten(2) for size in windows], dim=2)
    matrix = window_matrix(7, 7, windows)
    assert len(matrix) == regions
    torch.testing.assert_close(feature_map.flatten(2) @ matrix.T, expected)


def test_window_stride_and_oblong_maps():
    feature_map = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    expected = F.avg_pool2d(feature_map, 3, stride=2).flatten(2)
    torch.testing.assert_close(feature_map.flatten(2) @ window_matrix(6, 9, [3], stride=2).T, expected)


def test_windows_of_another_grid_lie_at_the_same_relative_places():
    small = torch.randn(1, 1, 7, 7, dtype=torch.float64)
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    own = small.flatten(2) @ window_matrix(7, 7, (3, 2)).T
    torch.testing.assert_close(large.flatten(2) @ window_matrix(56, 56, (3, 2), grid=(7, 7)).T, own)


def test_region_matrix_is_scales_then_windows():
    expected = torch.cat([pooling_matrix(7, 5, (1, 2), "adaptive"), window_matrix(7, 5, (3,), 2)])
    assert torch.equal(region_matrix(7, 5, Regions((1, 2), "adaptive", (3,), 2)), expected)


@FEW
@given(SIDES, SIDES, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans())
def test_pool_is_the_product_in_full_precision_in_any_memory_format(height, width, dtype, channels_last):
    feature_map = torch.randn(2, 5, height, width).to(dtype)
    if channels_last:
        feature_map = feature_map.to(memory_format=torch.channels_last)
    matrix = pooling_matrix(height, width, (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = pool(feature_map, matrix)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.einsum("rp,bcp->brc", matrix, feature_map.double().flatten(2))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_constant_map_has_equal_regions():
    feature_map = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 7, 7)
    regions = pool(feature_map, region_matrix(7, 7, Regions((1, 2, 4), "area", (3,), 2)))
    torch.testing.assert_close(regions, regions[:, :1].expand_as(regions))


@FEW
@given(SIDES, SIDES, st.sampled_from(MODES), st.sampled_from([-1, -2]))
def test_flipping_the_map_permutes_regions_within_each_scale(height, width, mode, axis):
    feature_map = torch.randn(1, 2, height, width, dtype=torch.float64)
    matrix = pooling_matrix(height, width, (1, 2, 4), mode)
    straight, flipped = pool(feature_map, matrix), pool(feature_map.flip(axis), matrix)
    for scale, where in scale_slices((1, 2, 4)).items():
        cells = straight[:, where].unflatten(1, (scale, scale)).flip(axis - 1)
        torch.testing.assert_close(flipped[:, where].unflatten(1, (scale, scale)), cells)


def test_a_scale_larger_than_the_map_repeats_its_values():
    """A 4 x 4 grid on a 2 x 2 map: each pixel four times, in every pooling."""
    for mode in MODES:
        cells = pooling_matrix(2, 2, [4], mode).view(2, 2, 2, 2, 4)
        assert torch.equal(cells[:, 0, :, 0].reshape(4, 4), torch.eye(4, dtype=torch.float64))
        assert torch.equal(cells[:, 0], cells[:, 1])


def test_usable_scales_leave_out_what_the_smaller_map_cannot_fill():
    assert usable_scales((1, 2, 4), (2, 2), (8, 8)) == (1, 2)
    assert usable_scales((1, 2, 4), (7, 3)) == (1, 2)


def test_complementary_rules_on_the_papers_cases():
    """Global right/local wrong and the reverse; both wrong on one class, and on different classes, where the rules differ."""
    scores = torch.eye(4)
    right, wrong, other_wrong = scores[0], scores[1], scores[2]
    labels = torch.zeros(2, dtype=torch.int64)
    teacher = torch.stack([torch.stack([right, right, wrong, wrong]), torch.stack([wrong, right, wrong, other_wrong])])
    by_label, by_class = (complementary(teacher, labels, rule).int().tolist() for rule in ("label", "class"))
    assert by_label == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert by_class == [[0, 0, 1, 1], [0, 1, 0, 1]]


def test_cached_matrix_made_under_inference_mode_can_train():
    arguments = ((5, 3), (1, 2), (), 1, (5, 3), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        made = cached_matrix(*arguments)
    assert not made.is_inference()
    assert cached_matrix(*arguments) is made


def test_a_compilers_matrix_is_a_copy_of_the_cached_one():
    """Its memory may be used for something else when the graph has read it."""
    arguments = ((6, 6), (1, 2), (3,), 2, (7, 7), torch.float32, torch.device("cpu"))
    cached, copy = cached_matrix(*arguments), _opaque_matrix(*arguments)
    assert torch.equal(cached, copy)
    assert cached.data_ptr() != copy.data_ptr()
    with FakeTensorMode():
        assert _opaque_matrix(*arguments).shape == cached.shape


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pooling_matrix(7, 7, []), "scales is empty"),
        (lambda: pooling_matrix(7, 7, [0]), "must be positive integers"),
        (lambda: pooling_matrix(7, 7, [1.5]), "must be positive integers"),
        (lambda: pooling_matrix(7, 7, [1, 2, 2]), "name one twice"),
        (lambda: pooling_matrix(7, 7, [1], "mean"), "'mean' is unknown; choose one of area, adaptive, cascade"),
        (lambda: pooling_matrix(7, 7, [1, 7], "cascade"), "scale 7 has no cells of its own"),
        (lambda: pooling_matrix(0, 7, [1]), "has no cells"),
        (lambda: window_matrix(7, 7, [8]), "window 8 is larger than the 7 x 7 map"),
        (lambda: window_matrix(7, 4, [5]), "window 5 is larger than the 7 x 4 map"),
        (lambda: window_matrix(7, 7, [3], stride=0), "stride 0"),
        (lambda: region_matrix(7, 7, Regions(scales=())), "both empty"),
        (lambda: complementary(torch.zeros(1, 1, 2), torch.zeros(1), "nearest"), "'nearest' is unknown"),
    ],
)
def test_impossible_regions_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
