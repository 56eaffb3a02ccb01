"""Before the first step: whether the teacher is as good as the recipe, or timm's published results, say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distill.config import RecipeError
from distill.models.published import IMAGENET_VALIDATION, is_imagenet, published_top1
from distill.protocols import InputSpec
from distill.recipe import Teacher


class Expectation(NamedTuple):
    """A top-1 that somebody vouches for, in percent, and how far from it is still right."""

    top1: float
    tolerance: float
    source: str


def expectation(teacher: Teacher, spec: InputSpec, class_names: Sequence[str], images: int) -> Expectation | None:
    """The recipe's number; else timm's, for its published weights on ImageNet; else None.

    On fewer images than the 50,000 that timm measured on, its number is known only up to sampling: three standard errors are
    added to the tolerance. The recipe's number is taken for these very shards.
    """
    if teacher.expected_top1 is not None:
        return Expectation(teacher.expected_top1, teacher.tolerance, "teacher.expected_top1")
    if teacher.published is None or teacher.weights != "pretrained" or not is_imagenet(class_names):
        return None
    top1 = published_top1(teacher.published, teacher.name, spec)
    if top1 is None:
        return None
    share = top1 / 100
    sampling = 0.0 if images == IMAGENET_VALIDATION else 300 * (share * (1 - share) / images) ** 0.5
    return Expectation(top1, teacher.tolerance + sampling, str(teacher.published))


def check_teacher(name: str, top1: float, expected: Expectation | None) -> str:
    """What a measured top-1 was compared with, for the log. RecipeError where it is off by more than the tolerance."""
    if expected is None:
        return "compared with nothing: neither teacher.expected_top1 nor teacher.published names its top-1"
    said = f"{expected.top1:.2f} +- {expected.tolerance:.2f} ({expected.source})"
    if abs(top1 - expected.top1) > expected.tolerance:
        raise RecipeError(
            f"teacher {name}: top-1 {top1:.2f} on the validation shards, expected {said}; usual reasons: weights of another"
            " tag, mean/std, crop or interpolation of another recipe, another class order in the shards"
        )
    return f"expected {said}"
