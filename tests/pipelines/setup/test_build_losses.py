"""The losses of a recipe are made from two models; what cannot be made is said for all of them at once."""

import pytest
import timm
import torch

from distill.config import RecipeError, load_recipe
from distill.losses import LOSSES
from distill.models.build import probe
from distill.protocols import DataFacts
from pipelines.setup.arguments import DEFAULT_RECIPE, parse
from pipelines.setup.models import build_criteria

DATA = DataFacts(num_samples=8, sample_labels=torch.arange(8), micro_batch=4)


def test_every_loss_that_the_pair_or_the_mixed_images_rule_out_is_named():
    student, teacher = (probe(timm.create_model(name, num_classes=10)) for name in ("cifar_resnet8", "cifar_resnet14"))
    asked = {"loss": {"kd": {}, "dkd": {}, "semckd": {}, "rkd": {}, "ctkd": {"base": "dkd"}}, "augment.mixup": 0.2}
    with pytest.raises(RecipeError) as caught:
        build_criteria(load_recipe(DEFAULT_RECIPE, asked, LOSSES), student, teacher, DATA)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["loss.dkd", "loss.semckd", "loss.ctkd"]
    assert "images mixed by augment.mixup" in lines[0]
    assert "8" in lines[1]


def test_an_option_that_another_base_has_is_dropped_by_the_words_of_the_refusal():
    student, teacher = (probe(timm.create_model(name, num_classes=10)) for name in ("cifar_resnet8", "cifar_resnet14"))
    words = ["--loss.sdd.base", "kd", "--loss.msdcrd", "null"]
    with pytest.raises(RecipeError, match="base 'kd' takes no option 'alpha' and no 'beta'; it takes temperature") as caught:
        build_criteria(parse(words, LOSSES).recipe, student, teacher, DATA)
    words += str(caught.value).partition("drop what it does not take: ")[2].split()
    assert build_criteria(parse(words, LOSSES).recipe, student, teacher, DATA)["sdd"].base_options == {"temperature": 4.0}
