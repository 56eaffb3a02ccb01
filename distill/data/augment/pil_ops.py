"""The operations of `policy.py` on PIL images: what timm calls, with arguments given."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from distill.data.augment import policy

ENHANCERS = {
    policy.COLOR: ImageEnhance.Color,
    policy.CONTRAST: ImageEnhance.Contrast,
    policy.BRIGHTNESS: ImageEnhance.Brightness,
    policy.SHARPNESS: ImageEnhance.Sharpness,
}
WITHOUT_ARGUMENT: dict[int, Callable[[Image.Image], Image.Image]] = {
    policy.AUTO_CONTRAST: ImageOps.autocontrast,
    policy.EQUALIZE: ImageOps.equalize,
    policy.INVERT: ImageOps.invert,
}


def apply_operation(image: Image.Image, operation: int, argument: float, fill: tuple[int, int, int]) -> Image.Image:
    """The image after one operation; `fill` is the colour of what comes in from outside."""
    if operation == policy.NONE:
        return image
    if operation in WITHOUT_ARGUMENT:
        return WITHOUT_ARGUMENT[operation](image)
    if operation in ENHANCERS:
        return ENHANCERS[operation](image).enhance(argument)
    if operation == policy.POSTERIZE:
        mask = 256 - (1 << (8 - int(argument)))  # by hand: Pillow 13 refuses 0 bits, which timm's policy draws
        return image.point([value & mask for value in range(256)] * 3)
    if operation == policy.SOLARIZE:
        return ImageOps.solarize(image, int(argument))
    if operation == policy.SOLARIZE_ADD:
        return image.point([min(255, value + int(argument)) if value < 128 else value for value in range(256)] * 3)
    if operation == policy.GAUSSIAN_BLUR:
        return image.filter(ImageFilter.GaussianBlur(argument))
    return _geometric(image, operation, argument, fill)


def _geometric(image: Image.Image, operation: int, argument: float, fill: tuple[int, int, int]) -> Image.Image:
    bilinear = Image.Resampling.BILINEAR
    if operation == policy.ROTATE:
        return image.rotate(argument, resample=bilinear, fillcolor=fill)
    matrix = {
        policy.SHEAR_X: (1, argument, 0, 0, 1, 0),
        policy.SHEAR_Y: (1, 0, 0, argument, 1, 0),
        policy.TRANSLATE_X: (1, 0, argument, 0, 1, 0),
        policy.TRANSLATE_Y: (1, 0, 0, 0, 1, argument),
    }[operation]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bilinear, fillcolor=fill)
