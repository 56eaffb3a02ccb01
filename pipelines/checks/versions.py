"""Checks of the installation: Python, packages, and what decodes. Imports little, for a package may be what is missing."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from pipelines.checks.finding import Finding, passed
from pipelines.checks.place import Place

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def installed(name: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(place: Place) -> Iterator[Finding]:
    """Python's, every package's against pyproject.toml, and those of what decodes."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    asked = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["train"]]]
    yield passed("python", f"{sys.version.split()[0]}, {sys.executable}")
    found = {each.name: installed(each.name) for each in asked}
    wrong = [each for each in asked if (version := found[each.name]) is None or not each.specifier.contains(version, True)]
    for each in wrong:
        text = f"{found[each.name] or 'not installed'}, and pyproject.toml asks for {each.specifier or 'any'}"
        yield Finding("FAIL", each.name, text, f"pip install '{each}'")
    others = ", ".join(f"{each.name} {found[each.name]}" for each in asked if each not in wrong)
    yield passed("packages", f"{others}")
    yield from dali_versions()


def dali_versions() -> Iterator[Finding]:
    """DALI, and that only one of its two builds is installed."""
    from distill.data.dali_graph import dali_available  # these need packages that may be what is missing
    from distill.data.decoding import library_versions

    builds = [name for name in ("nvidia-dali-cuda120", "nvidia-dali-cuda130") if installed(name)]
    if len(builds) > 1:
        remedy = f"pip uninstall {' '.join(builds)}, then pip install the one for this driver's CUDA"
        yield Finding("FAIL", "DALI", f"{' and '.join(builds)} are installed over each other", remedy)
        return
    if not dali_available():
        remedy = "pip install '.[train,dali-cuda130]' (or dali-cuda120 for drivers of CUDA 12); without it PIL decodes"
        yield Finding("WARN", "DALI", "not installed", remedy)
        return
    known = library_versions()
    if not known:
        text = "is installed, and cannot be imported; `python -c 'import nvidia.dali'` says why"
        yield Finding("FAIL", "DALI", text, "install it anew, or say --data.loader reference")
        return
    yield passed("DALI", ", ".join(f"{name} {version}" for name, version in known.items()))
