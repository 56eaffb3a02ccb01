"""One section of the examination: `python -m pipelines.checks SECTION PLACE.json` prints a line of JSON for each finding."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from importlib import import_module
from pathlib import Path

from distill.children import end_with_parent
from pipelines.checks.place import Place
from pipelines.checks.sections import SECTIONS


def main(section: str, place: str) -> None:
    """Makes the checks of a section; what ends the process ends only this section."""
    end_with_parent(signal.SIGKILL)
    module, function = SECTIONS[section].find.split(".")
    find = getattr(import_module(f"pipelines.checks.{module}"), function)
    for finding in find(Place(**json.loads(Path(place).read_text()))):
        print(json.dumps({"finding": dataclasses.asdict(finding)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
