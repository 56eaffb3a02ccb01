"""A finding: one line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Finding:
    """What was found about one thing."""

    status: Status
    """WARN: runs work, but slower or less safely. SKIP: it could not be looked at here; `text` says why."""
    name: str
    text: str
    remedy: str = ""
    """What to do about it; every WARN and FAIL has one where one is known."""
    measured: float | None = None
    limit: float | None = None
    """What `measured` was compared with; None where the figure is only reported."""

    def line(self) -> str:
        """The finding as it is printed."""
        return f"{self.status}  {self.name}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


def passed(name: str, text: str, measured: float | None = None) -> Finding:
    """A thing that is as it should be, or a figure that has no limit."""
    return Finding("PASS", name, text, measured=measured)


def skipped(name: str, reason: str) -> Finding:
    """A thing that could not be looked at here."""
    return Finding("SKIP", name, reason)


def judged(name: str, fine: bool, text: str, remedy: str = "", otherwise: Status = "FAIL") -> Finding:
    """PASS where it is fine, else `otherwise` with the remedy."""
    return Finding("PASS", name, text) if fine else Finding(otherwise, name, text, remedy)


def _bounded(
    words: Literal["at least", "at most"],
    name: str,
    measured: float,
    limit: float,
    unit: str,
    remedy: str = "",
    digits: int = 0,
) -> Finding:
    text = f"{measured:,.{digits}f} {unit} ({words} {limit:,.{digits}f})"
    fine = measured >= limit if words == "at least" else measured <= limit
    return Finding("PASS" if fine else "WARN", name, text, "" if fine else remedy, measured, limit)


at_least = partial(_bounded, "at least")
"""PASS where a figure reaches its limit, else WARN with the remedy."""
at_most = partial(_bounded, "at most")
"""PASS where a figure stays within its limit, else WARN with the remedy."""
