"""A look into a model's own forward pass, without a hook that stays and without a change of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn


class Tap(nn.Module):
    """A stand-in for the module `name` of a model during a call: keeps a copy of what the module reads or gives.

    Where `given` is set it gives that in the module's place, which then does not run.
    """

    kept: Tensor | None
    given: Tensor | None

    def __init__(self, name: str, keeps: Literal["input", "output"] = "input", copies: bool = True) -> None:
        super().__init__()
        self.name, self.keeps, self.copies = name, keeps, copies
        self.kept = self.given = None
        self._module: list[nn.Module] = []  # in a list, so that it is no child: it belongs to the model

    def forward(self, x: Tensor) -> Tensor:
        """What the module gives for `x`, or `given`."""
        if self.given is not None:
            return self.given
        if self.keeps == "input":
            self.kept = x.clone() if self.copies else x
        y: Tensor = self._module[0](x)
        if self.keeps == "output":
            self.kept = y.clone() if self.copies else y
        return y

    def taken(self) -> Tensor:
        """What was kept; the tap then holds nothing. RuntimeError where the module did not run."""
        kept, self.kept = self.kept, None
        if kept is None:
            raise RuntimeError(f"module {self.name} did not run in this forward pass, so there is nothing to read of it")
        return kept


@contextmanager
def tapped(model: nn.Module, taps: Sequence[Tap]) -> Iterator[None]:
    """A block in which the taps stand in the model; afterwards it is as it was."""
    places = []
    for tap in taps:
        parent_name, _, name = tap.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        module = parent._modules[name]
        assert module is not None
        places.append((parent, name, module))
        tap._module.append(module)
        setattr(parent, name, tap)
    try:
        yield
    finally:
        # in reverse: of two taps on one module the second stands in for the first
        for tap, (parent, name, module) in zip(reversed(taps), reversed(places), strict=True):
            tap._module.pop()
            setattr(parent, name, module)
