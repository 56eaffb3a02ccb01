"""Augmentation parameters: the distribution of torchvision's code, and evaluation geometry equal to timm's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms_factory import transforms_imagenet_eval

from distill.data.augment.parameters import (
    NUMBERS,
    TrainTransform,
    crop_windows,
    eval_geometry,
    flips,
    uniforms,
    view_uniforms,
)
from distill.protocols import InputSpec


def spec(height: int, width: int, crop_fraction: float) -> InputSpec:
    return InputSpec(height, width, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", crop_fraction)


def test_random_numbers_of_a_position_do_not_depend_on_the_block_they_are_asked_in():
    whole = uniforms(3, 1, 0, 100)
    assert whole.shape == (100, NUMBERS)
    assert np.array_equal(uniforms(3, 1, 37, 20), whole[37:57])
    assert not np.array_equal(uniforms(3, 2, 0, 100), whole)
    assert whole.min() >= 0
    assert whole.max() < 1
    assert len(np.unique(whole)) == whole.size


def test_random_numbers_of_a_sample_in_a_view_are_those_of_its_row_of_the_whole_view():
    whole = uniforms(3, 1, 0, 100)
    samples = np.array([99, 0, 41, 40, 42, 41, 7])
    assert np.array_equal(view_uniforms(3, 1, samples), whole[samples])
    assert np.array_equal(view_uniforms(3, 1, np.array([1_281_166])), uniforms(3, 1, 1_281_166, 1))
    assert view_uniforms(3, 1, samples[:0]).shape == (0, NUMBERS)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (20, 900), (900, 20)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.35, 1.0)])
def test_crop_windows_are_distributed_as_timms(size, scale):
    count = 4000
    transform = TrainTransform(scale=scale)
    ours = crop_windows(transform, np.tile(np.array(size, np.int64), (count, 1)), (224, 224), uniforms(0, 0, 0, count))
    image = Image.new("RGB", (size[1], size[0]))
    random.seed(0)
    theirs = np.array(
        [RandomResizedCropAndInterpolation.get_params(image, scale, transform.ratio) for _ in range(count)], np.int64
    )
    for column in range(4):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            # Two samples of 4,000: quantiles differ by about 1.6 % of the spread; 4 % of the side is beyond chance.
            side = size[column % 2]
            assert abs(np.quantile(ours[:, column], quantile) - np.quantile(theirs[:, column], quantile)) <= 0.04 * side + 1


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 2), (7, 500)])
def test_windows_of_odd_images_lie_inside_them(size):
    sizes = np.tile(np.array(size, np.int64), (500, 1))
    top, left, height, width = crop_windows(TrainTransform(), sizes, (224, 224), uniforms(1, 0, 0, 500)).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()


def test_pad_windows_reach_every_offset_equally_often():
    sizes = np.full((9000, 2), 32, np.int64)
    windows = crop_windows(TrainTransform(crop="pad", padding=4), sizes, (32, 32), uniforms(2, 0, 0, 9000))
    values, counts = np.unique(windows[:, 0], return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    assert counts.min() > 850  # 1,000 each, standard deviation 30
    assert (windows[:, 2:] == 32).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_come_with_the_asked_probability(probability):
    share = flips(TrainTransform(flip=probability), uniforms(0, 0, 0, 10000)).mean()
    assert abs(share - probability) < 0.02


@pytest.mark.parametrize("crop_fraction", [0.875, 0.9, 0.95, 0.96, 1.0])
@pytest.mark.parametrize("out", [(224, 224), (288, 288), (32, 32), (160, 224), (384, 288)])
def test_evaluation_sizes_and_anchors_are_timms(out, crop_fraction):
    """Read off timm's own transform: a picture whose pixels say where they were."""
    rng = np.random.default_rng(0)
    resize, centre_crop = transforms_imagenet_eval(out, crop_fraction, use_prefetcher=True).transforms[:2]
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(20, 700, 2))
        resized, anchor = eval_geometry(np.array([[height, width]], np.int64), spec(*out, crop_fraction))
        theirs = resize(Image.new("RGB", (width, height)))
        assert (theirs.height, theirs.width) == tuple(resized[0])
        rows, columns = np.mgrid[1 : theirs.height + 1, 1 : theirs.width + 1]
        marked = Image.fromarray((rows * 10000 + columns).astype(np.int32), "I")
        first = int(np.asarray(centre_crop(marked))[0, 0])
        assert divmod(first, 10000) == (anchor[0, 0] + 1, anchor[0, 1] + 1)


def test_impossible_transforms_are_refused_with_the_value():
    with pytest.raises(ValueError, match="crop 'rrc': must be one of random_resized, pad, simple_random, resize"):
        TrainTransform(crop="rrc")
    with pytest.raises(ValueError, match=r"scale \(0.5, 0.1\)"):
        TrainTransform(scale=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"flip 1.5: must be a probability"):
        TrainTransform(flip=1.5)
