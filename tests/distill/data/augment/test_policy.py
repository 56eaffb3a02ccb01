"""RandAugment and colour jitter: timm's operations, timm's distribution of their arguments, the same pixels in DALI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import ColorJitter

from distill.data.augment import policy
from distill.data.augment.parameters import LAYER_NUMBERS, TrainTransform, layers, uniforms
from distill.data.augment.pil_ops import apply_operation
from distill.data.augment.policy import parse_rand_augment
from distill.data.dali import DaliLoader
from distill.data.reference import ReferenceLoader
from distill.data.stream import Position
from tests.distill.data.conftest import picture
from tests.distill.data.test_loaders import KINDS, GraphLoader, needs_dali, same, train

NAMES = {
    "AutoContrast": policy.AUTO_CONTRAST,
    "Equalize": policy.EQUALIZE,
    "Invert": policy.INVERT,
    "Rotate": policy.ROTATE,
    "Posterize": policy.POSTERIZE,
    "Solarize": policy.SOLARIZE,
    "SolarizeAdd": policy.SOLARIZE_ADD,
    "Color": policy.COLOR,
    "Contrast": policy.CONTRAST,
    "Brightness": policy.BRIGHTNESS,
    "Sharpness": policy.SHARPNESS,
    "ShearX": policy.SHEAR_X,
    "ShearY": policy.SHEAR_Y,
    "TranslateXRel": policy.TRANSLATE_X,
    "TranslateYRel": policy.TRANSLATE_Y,
}
INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
ARGUMENTS = {
    policy.ROTATE: (27.5, -13.0),
    policy.POSTERIZE: (0, 1, 3, 4),
    policy.SOLARIZE: (26, 128, 256),
    policy.SOLARIZE_ADD: (99, 20),
    policy.COLOR: (0.1, 0.5, 1.81),
    policy.CONTRAST: (0.1, 0.5, 1.81),
    policy.BRIGHTNESS: (0.1, 0.5, 1.81),
    policy.SHARPNESS: (0.1, 0.5, 1.81),
    policy.SHEAR_X: (0.27, -0.2),
    policy.SHEAR_Y: (0.27, -0.2),
    policy.TRANSLATE_X: (0.4, -0.3),
    policy.TRANSLATE_Y: (0.4, -0.3),
}


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_timms_bit_for_bit(name):
    operation = NAMES[name]
    image = picture(60, 80, seed=1)
    relative = {policy.TRANSLATE_X: 80, policy.TRANSLATE_Y: 60}.get(operation, 1)
    for argument in ARGUMENTS.get(operation, (0,)):
        given = (argument,) if operation in ARGUMENTS else ()
        fill = (124, 116, 104)
        theirs = auto_augment.NAME_TO_OP[name](image, *given, fillcolor=fill, resample=Image.Resampling.BILINEAR)
        ours = apply_operation(image, operation, argument * relative, fill)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), argument


@pytest.mark.parametrize(
    "text", ["rand-m9-mstd0.5-inc1", "rand-m7-mstd1", "rand-m9-mstd101-p1-inc1", "rand-m15-mmax20-n3-inc1"]
)
def test_operations_and_arguments_are_distributed_as_timms(text, monkeypatch):
    """timm's own policy with its operations replaced by ones that write down their argument."""
    count = 12000
    settings = parse_rand_augment(text)
    theirs: dict[int, list[float]] = {operation: [] for operation in NAMES.values()}
    for name, operation in NAMES.items():
        relative = {policy.TRANSLATE_X: 80, policy.TRANSLATE_Y: 60}.get(operation, 1)

        def record(image, *given, operation=operation, relative=relative, **_):
            theirs[operation].append(given[0] * relative if given else 0.0)
            return image

        for key in (name, f"{name}Increasing") if name in INCREASING else (name,):
            monkeypatch.setitem(auto_augment.NAME_TO_OP, key, record)
    transform = auto_augment.rand_augment_transform(text, {"translate_pct": 0.45})
    image = Image.new("RGB", (80, 60))
    import random

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 (timm draws from it)
    for _ in range(count):
        transform(image)
    operations, arguments = layers(TrainTransform(rand_augment=text), (60, 80), uniforms(0, 0, 0, count))
    assert operations.shape == arguments.shape == (count, settings.layers)
    for operation, values in theirs.items():
        drawn = arguments[operations == operation]
        # Binomial counts: 4.5 standard deviations of the difference of two.
        assert abs(len(drawn) - len(values)) < 4.5 * np.sqrt(2 * len(values))
        spread = np.ptp(values) + 1e-6
        for quantile in (0.05, 0.25, 0.4, 0.6, 0.75, 0.95):
            # Away from the jump between the signs at 0.5; discrete arguments may differ by one step.
            step = 1 if operation in (policy.POSTERIZE, policy.SOLARIZE, policy.SOLARIZE_ADD) else 0
            assert abs(np.quantile(drawn, quantile) - np.quantile(values, quantile)) <= 0.08 * spread + step


@pytest.mark.parametrize("text", ["rand-m9-x3", "augmix-m3", "rand-tweights", "rand-n9", "rand-p2", "m9", "rand-m"])
def test_what_is_not_rebuilt_is_refused(text):
    with pytest.raises(ValueError, match=r"rand_augment '.*': must be like 'rand-m9-mstd0.5-inc1'"):
        TrainTransform(rand_augment=text)


def test_rand_augment_and_color_jitter_exclude_each_other():
    with pytest.raises(ValueError, match=r"color_jitter 0.4 with rand_augment 'rand-m9': give one of them"):
        TrainTransform(rand_augment="rand-m9", color_jitter=0.4)


def test_color_jitter_has_torchvisions_factors_and_every_order():
    operations, factors = layers(TrainTransform(color_jitter=0.4), (10, 10), uniforms(0, 0, 0, 6000))
    assert set(map(tuple, np.sort(operations, axis=1).tolist())) == {(policy.COLOR, policy.CONTRAST, policy.BRIGHTNESS)}
    _, counts = np.unique(operations, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 870  # 1,000 each, standard deviation 29
    torch.manual_seed(0)
    theirs = [ColorJitter.get_params((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), None)[1] for _ in range(3000)]
    for quantile in (0.1, 0.5, 0.9):
        assert abs(np.quantile(factors, quantile) - np.quantile(theirs, quantile)) < 0.03


def test_every_number_of_an_image_is_used_once():
    assert LAYER_NUMBERS + policy.MAX_LAYERS * policy.NUMBERS_PER_LAYER <= 64


@needs_dali
def test_the_graph_of_a_gpu_and_pil_agree_on_every_operation(make_split):
    """At most 2 levels, beside resizing's 1 level, which an operation may double.

    Lines where the image meets the fill, and the border that PIL does not sharpen, are left out. `equalize` is OpenCV's
    algorithm in DALI: its levels differ, its histogram is as flat.
    """
    index = make_split()
    options = {"crop": "resize", "rand_augment": "rand-m9-mstd3-n1-p1-inc1", "side": 48, "flip": 0.0}
    one, other = (train(kind, index, **options) for kind in (GraphLoader, ReferenceLoader))
    plain = train(ReferenceLoader, index, crop="resize", side=48, flip=0.0)
    seen = set()
    for epoch in range(6):
        for micro, (a, b, _) in enumerate(zip(one.epoch(epoch), other.epoch(epoch), plain.epoch(epoch), strict=True)):
            work = other.task.plan.work(Position(epoch, micro), np.full((12, 2), 48), np.arange(12))
            for row, operation in enumerate(work.operations[:, 0].tolist()):
                seen.add(operation)
                difference = (a.images[row].int() - b.images[row].int()).abs().numpy()[2:-2, 2:-2]
                if operation == policy.EQUALIZE:
                    assert difference.mean() < 12
                elif operation in (policy.POSTERIZE, policy.SOLARIZE, policy.SOLARIZE_ADD):
                    assert (difference > 1).mean() < 0.2  # resizing's 1 level may cross a threshold
                elif operation >= policy.SHEAR_X or operation == policy.ROTATE:
                    assert (difference > 2).mean() < 0.08
                else:
                    assert difference.max() <= 4
    assert seen == set(NAMES.values())
    for loader in (one, other, plain):
        loader.close()


@needs_dali
@pytest.mark.parametrize("options", [{"rand_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}])
def test_on_a_cpu_augmented_pixels_are_pils(options, make_split):
    one, other = (train(kind, make_split(), **options) for kind in (DaliLoader, ReferenceLoader))
    assert same(list(one.epoch(0)), list(other.epoch(0)))
    one.close()
    other.close()


@pytest.mark.parametrize("options", [{"rand_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}])
@pytest.mark.parametrize("kind", KINDS)
def test_augmented_streams_resume_bit_for_bit(kind, options, make_split):
    index = make_split()
    whole = train(kind, index, accumulate=2, **options)
    batches = list(whole.epoch(1))
    resumed = train(kind, index, accumulate=2, **options)
    assert same(list(resumed.epoch(1, 5)), batches[5:])
    assert same(list(whole.epoch(1, 3)), batches[3:])
    whole.close()
    resumed.close()
