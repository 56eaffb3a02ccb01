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
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt, last_error, run_child

if __name__ == "__main__":
    end_at_interrupt()

import distill
from distill.command_line import Parser, command, new_file, requests, whole_number
from distill.data.index import ShardIndex
from distill.data.remote.urls import is_url
from distill.errors import RequestError
from distill.files import write_atomically
from pipelines.checks.finding import Finding, skipped
from pipelines.checks.place import Place, make_own_shards
from pipelines.checks.sections import SECTIONS, Section

EPILOG = """
examples:
  python pipelines/doctor.py
      on a new machine, first of all
  python pipelines/doctor.py --full --shards data/imagenet/train --json doctor.json
      before days of GPU time

PASS: as it should be; WARN: runs work, but slower or less safely; FAIL: they will not, or not rightly; SKIP: not looked at.
exit codes: 0 no FAIL, 1 at least one, 2 the request was wrong.
"""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises RequestError."""
    parser = Parser(usage="python pipelines/doctor.py [options]", description=__doc__, epilog=EPILOG)
    parser.add_argument("--shards", default="", metavar="DIR", help="training shards to read and decode (default: made ones)")
    parser.add_argument("--out", default="runs", metavar="DIR", help="folder on whose disk runs will lie (%(default)s)")
    parser.add_argument("--full", action="store_true", help="also train, stop, resume, evaluate and measure")
    parser.add_argument("--pretend", action="store_true", help="walk the checks of a GPU on the CPU, with a small pair")
    parser.add_argument("--only", metavar="NAMES", help=f"sections, separated by commas: {', '.join(SECTIONS)}")
    parser.add_argument(
        "--minutes",
        type=whole_number(1),
        default=10,
        metavar="N",
        help="what is not done then is left out (%(default)s)",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write all findings there")
    asked = parser.parse_args(argv)
    names = asked.only.split(",") if asked.only is not None else []
    if unknown := [name for name in names if name not in SECTIONS]:
        raise RequestError(f"--only: {', '.join(unknown) or 'nothing'}: no such section; there are {', '.join(SECTIONS)}")
    if asked.pretend and not (asked.full or names):
        raise RequestError("--pretend: belongs to --full or --only, whose sections it walks on a CPU")
    if is_url(asked.shards):
        raise RequestError(
            f"--shards {asked.shards}: is a URL; give the folder of a local copy, whose disk is what is measured"
        )
    if asked.shards:
        with requests():
            ShardIndex.open(asked.shards)
    return asked


def chosen(asked: argparse.Namespace) -> dict[str, Section]:
    """The sections that are asked for."""
    names = asked.only.split(",") if asked.only else [n for n, section in SECTIONS.items() if asked.full or not section.full]
    return {name: SECTIONS[name] for name in names}


def examined(name: str, section: Section, place: Place) -> Iterator[Finding]:
    """The findings of a section, made in a process of its own; how that ends is a finding too, if it does not end well."""
    seconds = min(section.seconds, place.left)
    if seconds <= 0:
        yield skipped(name, f"no time was left; --only {name} makes it alone")
        return
    description = Path(place.folder) / "place.json"
    description.write_text(json.dumps(dataclasses.asdict(place)))
    command = [sys.executable, "-m", "pipelines.checks", name, str(description)]
    code, out, err = run_child(command, seconds, place.environment())
    for line in out.splitlines():
        if line.startswith('{"finding"'):
            yield Finding(**json.loads(line)["finding"])
    said = f": {last_error(err)}" if err.strip() else ""
    if code == -signal.SIGKILL and place.left <= 0:
        yield skipped(name, f"the examination's time was over; --minutes gives more, --only {name} makes it alone")
    elif code == -signal.SIGKILL:
        yield Finding("FAIL", name, f"not done within {seconds:.0f} s, or killed", f"see whether --only {name} ends")
    elif code < 0:
        yield Finding("FAIL", name, f"ended by {signal.Signals(-code).name}{said}", "report it")
    elif code:
        yield Finding("FAIL", name, f"exit code {code}{said}", "mend what it names, or report it")


def make_pictures_of(place: Place, full: bool) -> Iterator[Finding]:
    """Makes the shards that the checks read; a finding where that fails."""
    if (Path(place.folder) / "made").exists():
        return
    try:
        make_own_shards(Path(place.folder) / "made", large=place.on_gpu, copies=8 if full and place.on_gpu else 1)
    except (ImportError, OSError, RuntimeError) as error:
        yield Finding("FAIL", "shards of the examination", str(error), "pip install '.[train]'")


def report(asked: argparse.Namespace, place: Place) -> list[dict[str, object]]:
    """Makes the sections one after the other and prints their lines; all findings as plain JSON."""
    found: list[dict[str, object]] = []
    for name, section in chosen(asked).items():
        print(f"\n{section.title}", flush=True)
        start = time.monotonic()
        findings = list(make_pictures_of(place, asked.full)) if section.pictures else []
        for finding in findings or examined(name, section, place):
            print(finding.line(), flush=True)
            found.append({"section": name, **dataclasses.asdict(finding)})
        print(f"      {time.monotonic() - start:.0f} s", flush=True)
    return found


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Ends the command as an exception does, so that its folder is removed and its sections are ended."""
    raise SystemExit(128 + number)


@command
def main(argv: Sequence[str]) -> int:
    """Prints the report; the exit code says whether anything failed."""
    asked = arguments(argv)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="distill-doctor-") as folder:
        place = Place(folder, os.path.abspath(asked.out), asked.shards, asked.pretend, start + 60 * asked.minutes)
        print(f"distill {distill.__version__} on {os.uname().sysname} {os.uname().release}; shards: {asked.shards or 'made'}")
        found = report(asked, place)
    counts = {status: sum(each["status"] == status for each in found) for status in ("PASS", "WARN", "FAIL", "SKIP")}
    print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())} in {time.monotonic() - start:.0f} s")
    if asked.json is not None:
        facts = {"version": distill.__version__, "full": asked.full, "findings": found}
        write_atomically(asked.json, json.dumps(facts, indent=2) + "\n")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
