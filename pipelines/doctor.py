"""Examines a machine: what a run needs, what works, how fast it is. The report is what a bug report wants.

python pipelines/doctor.py --help
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

import torch

import distill
from distill.command_line import Parser, command, requests
from distill.config import RecipeError
from distill.data.decoding import last_error, run_child
from distill.data.index import ShardIndex
from pipelines.checks.finding import Finding
from pipelines.checks.place import Place, make_shards
from pipelines.checks.sections import SECTIONS, Section

EPILOG = """
examples:
  python pipelines/doctor.py
      on a new machine, first of all
  python pipelines/doctor.py --full --train data/imagenet/train --val data/imagenet/val --json doctor.json
      before days of GPU time: under 10 minutes on one GPU

PASS: as it should be; WARN: runs work, but slower or less safely; FAIL: they will not, or not rightly; SKIP: not looked at.
exit codes: 0 no FAIL, 1 at least one, 2 the request was wrong.
"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises RecipeError."""
    parser = Parser(usage="python pipelines/doctor.py [options]", description=__doc__, epilog=EPILOG)
    parser.add_argument("--train", metavar="DIR", help="training shards (default: made for the examination)")
    parser.add_argument("--val", metavar="DIR", help="validation shards; with --train")
    parser.add_argument("--out", default="runs", metavar="DIR", help="folder on whose disk runs will lie (%(default)s)")
    parser.add_argument("--full", action="store_true", help="also train, stop, resume, evaluate and measure: minutes")
    parser.add_argument(
        "--pretend", action="store_true", help="with --full: walk the GPU's checks on the CPU, with a small pair"
    )
    parser.add_argument("--only", metavar="NAMES", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all findings there")
    asked = parser.parse_args(argv)
    if (asked.train is None) != (asked.val is None):
        raise RecipeError("--train and --val: one without the other; give both, or none for made pictures")
    names = asked.only.split(",") if asked.only else []
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise RecipeError(f"--only: {', '.join(unknown)}: no such section; there are {', '.join(SECTIONS)}")
    if asked.json is not None and not asked.json.absolute().parent.is_dir():
        raise RecipeError(f"--json: {asked.json.absolute().parent} is no folder; make it first")
    with requests():
        for folder in filter(None, (asked.train, asked.val)):
            ShardIndex.open(folder)
    return asked


def chosen(asked: argparse.Namespace) -> dict[str, Section]:
    """The sections that are asked for."""
    names = asked.only.split(",") if asked.only else [n for n, section in SECTIONS.items() if asked.full or not section.full]
    return {name: SECTIONS[name] for name in names}


def examined(name: str, section: Section, place: Path) -> Iterator[Finding]:
    """The findings of a section, made in a process of its own; how that ends is a finding too, if it does not end well."""
    code, out, err = run_child([sys.executable, "-m", "pipelines.checks", name, str(place)], section.seconds)
    for line in out.splitlines():
        if line.startswith('{"finding"'):
            yield Finding(**json.loads(line)["finding"])
    if code == -signal.SIGKILL:
        yield Finding("FAIL", name, f"not done within {section.seconds:.0f} s, or killed", "run it alone: --only " + name)
    elif code < 0:
        yield Finding("FAIL", name, f"ended by {signal.Signals(-code).name}; {last_error(err)}", "report it")
    elif code:
        yield Finding("FAIL", name, f"exit code {code}: {last_error(err)}", "report it")


def report(asked: argparse.Namespace, place: Path) -> list[dict[str, object]]:
    """Makes the sections one after the other and prints their lines; all findings as plain JSON."""
    found: list[dict[str, object]] = []
    for name, section in chosen(asked).items():
        print(f"\n{section.title}", flush=True)
        start = time.monotonic()
        for finding in examined(name, section, place):
            print(finding.line(), flush=True)
            found.append({"section": name, **dataclasses.asdict(finding)})
        print(f"      {time.monotonic() - start:.0f} s", flush=True)
    return found


@command
def main(argv: Sequence[str]) -> int:
    """Prints the report; the exit code says whether anything failed."""
    asked = arguments(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distill-doctor-") as scratch:
        folder = Path(scratch)
        made = asked.train is None
        if made:
            make_shards(folder / "made", large=asked.full and torch.cuda.is_available() and not asked.pretend)
        train, val = (str(folder / "made" / split) for split in ("train", "val")) if made else (asked.train, asked.val)
        place = Place(train, val, os.path.abspath(asked.out), scratch, asked.pretend, made)
        description = folder / "place.json"
        description.write_text(json.dumps(dataclasses.asdict(place)))
        print(
            f"distill {distill.__version__} on {os.uname().sysname} {os.uname().release}; shards: {'made' if made else train}"
        )
        found = report(asked, description)
    counts = {status: sum(each["status"] == status for each in found) for status in ("PASS", "WARN", "FAIL", "SKIP")}
    print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())} in {time.monotonic() - start:.0f} s")
    if asked.json is not None:
        asked.json.write_text(
            json.dumps({"version": distill.__version__, "full": asked.full, "findings": found}, indent=2) + "\n"
        )
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
