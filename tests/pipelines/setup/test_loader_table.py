"""The loaders that a recipe may name are those of the table."""

from typing import get_args

from distill.data.loaders import LoaderName
from pipelines.setup.data import LOADERS


def test_every_loader_that_a_recipe_may_name_is_in_the_table():
    assert set(LOADERS) == set(get_args(LoaderName))
