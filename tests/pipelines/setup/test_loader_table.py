"""The loaders that a recipe may name are those of the table, and one that is not installed is refused with its extra."""

import sys
from typing import get_args

import pytest

from distill.data.loaders import LoaderName
from distill.errors import RequestError
from pipelines.setup.data import LOADERS, loader_name


def test_every_loader_that_a_recipe_may_name_is_in_the_table():
    assert set(LOADERS) == set(get_args(LoaderName))


def test_dali_is_refused_where_it_is_not_installed_and_its_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(RequestError, match=r"dali-cuda120 \(CUDA 12\) or dali-cuda130 \(CUDA 13\)"):
        loader_name("dali")
    assert loader_name("auto") == "reference"
