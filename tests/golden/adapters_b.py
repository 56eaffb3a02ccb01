"""Adapters of the second family of methods: method, as the index calls it -> what computes its cases with our code."""

from __future__ import annotations

from tests.golden.case import Adapter

ADAPTERS: dict[str, Adapter] = {}
