"""Golden cases: what the reference code was given and what it gave, read from any of the three formats of an `index.json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class Stored(Mapping[str, Tensor]):
    """The tensors of a case; remembers which of them were read, for those are the inputs."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        found = self.tensors[name]
        self.read.add(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Options(Mapping[str, Any]):
    """The method's own options in a case; remembers which of them were read: one that is not changes nothing."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_by_name = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        found = self.values_by_name[name]
        self.read.add(name)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.values_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


@dataclass
class Case:
    """One entry of an index."""

    id: str
    method: str
    """What its adapter is found by."""
    options: Mapping[str, Any]
    """The method's own options, under the reference's names."""
    entry: dict[str, Any]
    """The whole entry of the index."""
    inputs: Stored = field(default_factory=lambda: Stored({}))
    noise: float = 0.0
    """Absolute error of the stored numbers: zeros of exact arithmetic that are rounding errors in the reference's order."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Stored tensors that an adapter can neither read nor give, by a regular expression of their names, with the reason."""

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without the beginning."""
        return {name[len(prefix) :]: self.inputs[name] for name in self.inputs if name.startswith(prefix)}


Adapter = Callable[[Case], dict[str, Any]]
"""Reads a case's inputs and gives what we compute (tensors or numbers) under the names of the stored outputs."""

# The indices of the papers' methods (a) and of the ceiling name no noise. Their stored zeros (a scaled copy, a similar figure)
# are rounding errors of up to 1e-15 in float64 behind weights of up to 50 and 600.
UNNAMED_NOISE = 1e-14
ROUNDING = torch.finfo(torch.float64).eps
"""Least noise of a case: `1 - r` of a correlation near 1 is off by this much where sums have another order (a GPU)."""


def cases(folder: Path) -> list[Case]:
    """Every case of a folder's `index.json`, its tensors not yet loaded. ValueError for an index of another format."""
    path = folder / "index.json"
    try:
        index = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    listed = index.get("cases") if isinstance(index, dict) else None
    if not listed or not isinstance(listed, list | dict):
        raise ValueError(f"{path}: has no `cases`; give the folder of an index that lists them")
    wanted = {"kind"} if isinstance(listed, dict) else {"id", "method", "hyper"}
    for number, entry in enumerate(listed.values() if isinstance(listed, dict) else listed):
        if missing := sorted(wanted - entry.keys()):
            raise ValueError(f"{path}: case {number} has no {', '.join(missing)}; its index is of another format")
    if isinstance(listed, dict):  # ceiling: name -> options with a kind
        return [Case(name, entry["kind"], entry, entry, noise=UNNAMED_NOISE) for name, entry in listed.items()]
    # methods/b says its absolute noise, methods/a does not
    noises = [max(entry.get("absolute_noise", UNNAMED_NOISE), ROUNDING) for entry in listed]
    return [Case(e["id"], e["method"], Options(e["hyper"]), e, noise=noise) for e, noise in zip(listed, noises, strict=True)]


def load(case: Case, folder: Path) -> None:
    """Reads the case's tensors. Those of methods/b are inputs of a float64 computation, stored in float32 without loss."""
    path = folder / case.entry.get("file", f"{case.id}.safetensors")
    if case.method == "schedule":  # its numbers are in the index: part -> epoch -> weight
        parts = {name: part["at"] for name, part in case.entry.items() if isinstance(part, dict)}
        numbers = {f"{name}.{epoch}": weight for name, part in parts.items() for epoch, weight in part.items()}
        case.inputs = Stored({name: torch.tensor(weight, dtype=torch.float64) for name, weight in numbers.items()})
        return
    tensors = load_file(path)
    if "module_mode" in case.entry:
        tensors = {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}
    case.inputs = Stored(tensors)
