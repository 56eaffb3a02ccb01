"""3-Augment and the simple random crop of DeiT III: timm's and torchvision's pixels, and where DALI's graph differs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from timm.data import auto_augment

from distill.data.augment import policy
from distill.data.augment.parameters import TrainTransform, layers, uniforms
from distill.data.augment.pil_ops import apply_operation
from distill.data.dali import DaliLoader
from distill.data.pixels import decode
from distill.data.reference import ReferenceLoader, read_sample
from distill.data.stream import Position
from tests.distill.data.conftest import picture
from tests.distill.data.test_loaders import KINDS, GraphLoader, differences, needs_dali, same, train

THREE = {"three_augment": True, "color_jitter": 0.3}
SRC = {"crop": "simple_random", "padding": 4, "interpolation": "bicubic"}
JITTER = {policy.BRIGHTNESS: TF.adjust_brightness, policy.CONTRAST: TF.adjust_contrast, policy.COLOR: TF.adjust_saturation}


def test_each_image_gets_one_of_the_three_by_equal_chance_and_then_the_jitter():
    """timm's own policy 3a is the oracle of the three and of the blur's radius."""
    count = 6000
    operations, arguments = layers(TrainTransform(**THREE), (10, 10), uniforms(0, 0, 0, count))
    assert operations.shape == (count, 4)
    assert all(set(row) == set(JITTER) for row in operations[:50, 1:].tolist())
    drawn = dict(zip(*np.unique(operations[:, 0], return_counts=True), strict=True))
    assert set(drawn) == {policy.COLOR, policy.SOLARIZE, policy.GAUSSIAN_BLUR}
    assert min(drawn.values()) > 1830  # 2,000 each, standard deviation 37
    assert set(arguments[operations[:, 0] == policy.COLOR, 0]) == {0.0}
    assert set(arguments[operations[:, 0] == policy.SOLARIZE, 0]) == {128.0}
    radius = arguments[operations[:, 0] == policy.GAUSSIAN_BLUR, 0]
    assert radius.min() >= 0.1
    assert radius.max() < 2.0
    assert np.quantile(radius, [0.25, 0.5, 0.75]) == pytest.approx([0.575, 1.05, 1.525], abs=0.07)


def test_the_three_operations_are_timms_policy_bit_for_bit(monkeypatch):
    image = picture(60, 80, seed=1)
    ours = {
        "Desaturate": apply_operation(image, policy.COLOR, 0.0, (0, 0, 0)),
        "Solarize": apply_operation(image, policy.SOLARIZE, 128.0, (0, 0, 0)),
        "GaussianBlurRand": apply_operation(image, policy.GAUSSIAN_BLUR, 1.25, (0, 0, 0)),
    }
    monkeypatch.setattr(random, "uniform", lambda low, high: 1.25 if (low, high) == (0.1, 2.0) else None)
    theirs = auto_augment.auto_augment_policy_3a({})
    assert {op.name for (op,) in theirs} == set(ours)
    for (op,) in theirs:
        assert np.array_equal(np.asarray(ours[op.name]), np.asarray(op(image))), op.name
    assert ours["Desaturate"] == TF.rgb_to_grayscale(image, 3)
    assert ours["Solarize"] == TF.solarize(image, 128)


def by_torchvision(image: Image.Image, work, row: int, side: int, padding: int) -> np.ndarray:
    """DeiT's chain with the parameters that were drawn: resize, crop of the mirrored image, flip, one of three, jitter."""
    image = TF.resize(image, side, TF.InterpolationMode.BICUBIC)
    top, left = (work.anchors[row] + padding).tolist()
    image = TF.crop(TF.pad(image, padding, padding_mode="reflect"), top, left, side, side)
    image = TF.hflip(image) if work.flips[row] else image
    (first, *jitter), (argument, *factors) = work.operations[row].tolist(), work.arguments[row].tolist()
    if first == policy.COLOR:
        image = TF.rgb_to_grayscale(image, 3)
    elif first == policy.SOLARIZE:
        image = TF.solarize(image, 128)
    else:
        image = image.filter(ImageFilter.GaussianBlur(argument))
    for operation, factor in zip(jitter, factors, strict=True):
        image = JITTER[operation](image, factor)
    return np.asarray(image)


@pytest.mark.parametrize("kind", [pytest.param(DaliLoader, marks=needs_dali), ReferenceLoader])
def test_on_a_cpu_a_view_is_torchvisions_bit_for_bit(kind, make_split):
    index = make_split()
    loader = train(kind, index, **SRC, **THREE)
    seen = set()
    for micro, batch in enumerate(loader.epoch(0)):
        samples = batch.sample_ids.numpy()
        work = loader.task.plan.work(Position(0, micro), index.sizes(samples), samples)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            expected = by_torchvision(decode(read_sample(index, sample)), work, row, 40, 4)
            assert np.array_equal(batch.images[row].numpy(), expected), (micro, row)
            seen.add(int(work.operations[row, 0]))
    assert len(seen) == 3
    loader.close()


@needs_dali
def test_the_graph_of_a_gpu_cuts_the_simple_random_crop_out_of_the_same_mirrored_pixels(make_split):
    index = make_split()
    for interpolation in ("bilinear", "bicubic"):
        loaders = [train(kind, index, **{**SRC, "interpolation": interpolation}) for kind in (GraphLoader, ReferenceLoader)]
        # the resized image's own border is inside of the view here, mirrored: it counts as the outermost lines do
        difference = differences(*(list(loader.epoch(1)) for loader in loaders))
        assert np.quantile(difference, 0.97) <= 1
        assert difference.mean() < 0.35
        for loader in loaders:
            loader.close()


@needs_dali
def test_the_graph_of_a_gpu_blurs_by_a_true_gaussian_and_agrees_on_the_other_two(make_split):
    """PIL blurs by three box filters and repeats the last pixel at the border; DALI blurs by the Gaussian and mirrors there."""
    index = make_split()
    loaders = [train(kind, index, crop="resize", flip=0.0, three_augment=True) for kind in (GraphLoader, ReferenceLoader)]
    seen = set()
    for micro, (a, b) in enumerate(zip(*(loader.epoch(0) for loader in loaders), strict=True)):
        work = loaders[0].task.plan.work(Position(0, micro), np.full((12, 2), 40), a.sample_ids.numpy())
        for row, operation in enumerate(work.operations[:, 0].tolist()):
            seen.add(operation)
            difference = (a.images[row].int() - b.images[row].int()).abs().numpy()
            inside = difference[4:-4, 4:-4]
            if operation == policy.SOLARIZE:
                assert (inside > 1).mean() < 0.2  # resizing's 1 level may cross the threshold
            else:
                assert inside.max() <= (3 if operation == policy.COLOR else 5)
                assert difference.max() <= 40
                assert difference.mean() < 1.5
    assert seen == {policy.COLOR, policy.SOLARIZE, policy.GAUSSIAN_BLUR}
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_these_views_resume_bit_for_bit(kind, make_split):
    index = make_split()
    whole, resumed = (train(kind, index, accumulate=2, **SRC, **THREE) for _ in range(2))
    batches = list(whole.epoch(1))
    assert same(list(resumed.epoch(1, 5)), batches[5:])
    for loader in (whole, resumed):
        loader.close()


def test_jitter_without_three_augment_draws_what_it_drew_before_there_was_any():
    numbers = uniforms(3, 1, 7, 40)
    alone, now = policy.draw_color_jitter(0.4, numbers[:, 23:]), layers(TrainTransform(color_jitter=0.4), (8, 8), numbers)
    assert all(np.array_equal(a, b) for a, b in zip(alone, now, strict=True))


def test_what_cannot_be_is_refused(make_split):
    with pytest.raises(ValueError, match="three_augment with rand_augment 'rand-m9': give one of them"):
        TrainTransform(rand_augment="rand-m9", three_augment=True)
    with pytest.raises(ValueError, match="padding 40: must be less than the side of the views, 40, to be mirrored"):
        train(ReferenceLoader, make_split(), crop="simple_random", padding=40)
