"""The compatibility table: every architecture of the installed timm, checked one by one, resumable."""

from __future__ import annotations

import csv
import gc
import logging
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from distill.files import write_atomically
from distill.models.describe import Description, count_parameters, create_outline, describe, probed_with_noise
from distill.models.input_spec import input_spec_of
from distill.models.region_logits.layout import TimmModel
from distill.protocols import Needs

logger = logging.getLogger(__name__)

EXPENSIVE = 1e13
"""Parameters times pixels above which an architecture is checked on smaller images: some five seconds of one core."""
SMALLER = (112, 224)
"""Pixels a side of those, the first that works: whole patches of 14 and 16, the second also whole cells of 32."""
COLUMNS = 120
"""Longest line of the page, as in all docs."""

FIELDS = (
    "name", "class", "parameters_M", "input", "features", "grid", "stage_channels", "head_batchnorms", "mechanism",
    "whole_image_difference", "reason", "seconds",
)  # fmt: skip


def check_all(pattern: str, out: Path, page: Path | None, needs: Needs) -> int:
    """Checks the architectures that match and have no row in `out` yet, adds their rows one by one, and sums up.

    Returns 1 where a check itself failed, else 0; a refusal with its reason is a result. ValueError where nothing matches.
    """
    names = timm.list_models(pattern)
    if not names:
        raise ValueError(f"--pattern {pattern}: no architecture of timm matches; try '*resnet*'")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder; give a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in read(out)}
    for number, name in enumerate(names, start=1):
        if name in done:
            continue
        row = check(name, needs)
        append(out, row)
        print(
            f"{number}/{len(names)} {name}: {row['mechanism']} {row['whole_image_difference']} {row['reason'][:100]}",
            flush=True,
        )
        gc.collect()
    rows = [row for row in read(out) if row["name"] in set(names)]
    if page is not None:
        write_atomically(page, as_page(rows, len(names)))
    print(summary(rows, len(names)))
    return int(any(row["mechanism"] == "failed" for row in rows))


def check(name: str, needs: Needs) -> dict[str, str]:
    """One row of the table."""
    start = time.perf_counter()
    row = dict.fromkeys(FIELDS, "") | {"name": name}
    torch.manual_seed(0)
    try:
        model = create_outline(name, num_classes=10)
        row["class"] = type(model).__name__
        found = describe_affordably(name, model, needs)
    except ValueError as error:
        row |= {"mechanism": "refused", "reason": str(error)}
    except Exception as error:  # one architecture must not end the check of a thousand; the row says what happened
        row |= {"mechanism": "failed", "reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    else:
        exact = found.whole_image_difference
        own, checked = (f"{spec.height}x{spec.width}" for spec in (input_spec_of(model), found.input_spec))
        row |= {
            "parameters_M": f"{count_parameters(model) / 1e6:.2f}",
            "input": own if checked == own else f"{own}, checked at {checked}",
            "features": found.features,
            "grid": f"{found.grid[0]}x{found.grid[1]}",
            "stage_channels": " ".join(str(stage.channels) for stage in found.facts.stages),
            "head_batchnorms": str(found.head_batchnorms),
            "mechanism": found.mechanism,
            "whole_image_difference": "" if exact is None else f"{exact:.1e}",
            "reason": found.refusal,
        }
    return row | {"seconds": f"{time.perf_counter() - start:.1f}"}


def describe_affordably(name: str, model: TimmModel, needs: Needs) -> Description:
    """The description at the model's own input, or on smaller images where that is `EXPENSIVE` and the model takes them."""
    own = input_spec_of(model)
    fixed: Any = model.pretrained_cfg
    affordable = count_parameters(model) * own.height * own.width <= EXPENSIVE
    for side in () if affordable else SMALLER:
        small = replace(own, height=min(own.height, side), width=min(own.width, side))
        size = {"img_size": (small.height, small.width)} if fixed.get("fixed_input_size") else {}
        try:
            outline = create_outline(name, num_classes=10, **size)
            with probed_with_noise(outline, name=name, input_spec=small) as probed:
                found = describe(probed, needs, count_flops=False)
        except Exception:  # whatever it was about the smaller images, the check at its own size says the rest
            logger.info("%s: not checked at %d px", name, side, exc_info=True)
        else:
            if not found.refusal:
                return found
    with probed_with_noise(model, name=name) as probed:
        return describe(probed, needs, count_flops=False)


def read(out: Path) -> list[dict[str, str]]:
    """The rows so far; none where there is no file."""
    if not out.exists():
        return []
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def append(out: Path, row: dict[str, str]) -> None:
    """Adds one row, and the header before the first."""
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def summary(rows: list[dict[str, str]], total: int) -> str:
    """The number of architectures of each mechanism, and the least exact of all, as one line."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["mechanism"]] = counts.get(row["mechanism"], 0) + 1
    parts = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    worst = max((float(row["whole_image_difference"] or 0) for row in rows), default=0.0)
    return f"{len(rows)} of {total} architectures checked: {parts}; largest whole-image difference {worst:.1e}"


def about_smaller(rows: list[dict[str, str]]) -> list[str]:
    """What it means that some architectures were checked on smaller images; nothing where none was."""
    count = sum("checked at" in row["input"] for row in rows)
    if not count:
        return []
    return [
        "",
        f"{count} architectures of more than {EXPENSIVE:.0e} parameters x pixels were checked on smaller images, as `input`",
        "says in the CSV; token models were built for that size. The same layers ran, and whether the head on regions is the",
        "head on the image is a matter of its layers, not of the grid's size. Their grid in the CSV is that of these images.",
    ]


def as_page(rows: list[dict[str, str]], total: int) -> str:
    """The table as Markdown, one line per class of timm and mechanism, refused architectures one by one."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["class"], row["features"], row["mechanism"]), []).append(row)
    lines = [
        "# Compatibility with timm's architectures",
        "",
        *textwrap.wrap(f"timm {timm.__version__}. {summary(rows, total)}.", COLUMNS),
        "Written by `python pipelines/pairs.py matrix --page`; one line per class, form of the features and mechanism.",
        *about_smaller(rows),
        "",
        "| class | features | mechanism | architectures | largest difference | example |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, features, mechanism), members in sorted(groups.items()):
        worst = max(float(row["whole_image_difference"] or 0) for row in members)
        lines.append(f"| {kind} | {features} | {mechanism} | {len(members)} | {worst:.0e} | {members[0]['name']} |")
    refused = [row for row in rows if row["mechanism"] in ("refused", "failed")]
    reasons = (f"- `{row['name']}`: {row['reason']}" for row in refused)
    lines += ["", "## Refused", "", *(textwrap.fill(reason, COLUMNS, subsequent_indent="  ") for reason in reasons)]
    return "\n".join(lines) + "\n"
