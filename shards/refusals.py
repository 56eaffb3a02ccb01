"""Images that a preparation leaves out: why, how many, and when there are too many of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_REFUSED = 0.01
"""Share of a split's images that may be refused where nothing is asked for. ImageNet has none. A few in a thousand are usual
for images from the web; more is a mistake in the request, such as labels in another field."""
SHOWN = 5
"""Reasons that are shown; the file has them all."""
VALUES = re.compile(r"b?'[^']*'|b?\"[^\"]*\"|\d+")
"""The parts of a reason that differ from image to image."""


class TooManyRefused(RuntimeError):
    """More images were refused than is allowed; the text has the commonest reasons, each with its number and an example."""


def reasons_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each of the commonest reasons: how many images it refuses, its text for the first, and which that is."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(VALUES.sub("#", entry["reason"]), []).append(entry)
    ordered = sorted(groups.values(), key=len, reverse=True)
    lines = [f"{len(group):,} x {group[0]['reason']} (such as {_name(group[0])})" for group in ordered[:SHOWN]]
    if rest := sum(map(len, ordered[SHOWN:])):
        lines.append(f"{rest:,} for {len(ordered) - SHOWN} other reasons")
    return lines


def _name(entry: Mapping[str, Any]) -> str:
    source = entry["source"]
    return f"{entry['key']} in {source}" if source.endswith(".tar") else source


def read_refusals(file: Path) -> list[dict[str, Any]]:
    """The entries of a quarantine file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def check_refused(name: str, kept: int, refused: list[Mapping[str, Any]], most: float, file: Path) -> None:
    """Raises TooManyRefused where a split keeps nothing, or more than the share `most` of it is refused."""
    total = kept + len(refused)
    if kept and len(refused) <= most * total:
        return
    said = "nothing is left" if not kept else f"more than --max-refused {100 * most:g} (per cent) allows"
    lines = [
        f"{name}: {len(refused):,} of {total:,} images are refused, {said}; they are listed in {file}",
        *reasons_of(refused),
    ]
    raise TooManyRefused("\n  ".join(lines))
