"""Runs as processes of their own: `pipelines/imagenet.py` with a written recipe, made once, stopped politely, explained."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from distill.agreement import Control
from distill.config import RecipeError, as_dict
from distill.errors import Interrupted, RequestError
from distill.files import RUN_MANIFEST, RUN_SUMMARY, write_atomically
from distill.recipe import Recipe
from pipelines.setup.launcher import STARTED_BY_US

TRAIN = Path(__file__).parent.parent / "imagenet.py"
REFUSED = 2
"""Exit code of a request that was wrong."""


def add_launch_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--launch WORDS`, which `train_command` takes."""
    parser.add_argument("--launch", default=shlex.quote(sys.executable), metavar="WORDS", help='such as "accelerate launch"')


def train_command(launch: str, imports: Sequence[Path] = ()) -> list[str]:
    """The words of the main command, to which a recipe is added. RequestError where `launch` names no program."""
    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise RequestError(f"--launch {launch}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise RequestError(f"--launch {launch or repr('')}: no such program; give one of the PATH, or its whole path")
    return [*words, str(TRAIN), *(word for file in imports for word in ("--import", str(file)))]


def summary_of(recipe: Recipe) -> dict[str, Any]:
    """What a finished run of the recipe measured."""
    found: dict[str, Any] = json.loads((Path(recipe.out) / RUN_SUMMARY).read_text())
    return found


def ended_badly(run: str, code: int, said: str) -> Exception:
    """What to raise for a run without which there is nothing to compare: it was refused, or it failed."""
    return RecipeError(f"{run}: {said}") if code == REFUSED else RuntimeError(f"{run} failed with exit code {code}: {said}")


def made(recipe: Recipe, train: Sequence[str], control: Control) -> tuple[int, str]:
    """Exit code of the run of a recipe, which is not made again where it is finished, and what is wrong, if anything is.

    Its recipe and its log are beside the run's folder. It draws no page: many runs are summed up in one table, and
    `pipelines/report.py` draws those that somebody wants to look at. Raises Interrupted where this process is asked to stop.
    """
    recipe = dataclasses.replace(recipe, report=dataclasses.replace(recipe.report, page=False))
    folder = Path(recipe.out)
    if finished(folder, recipe):
        return 0, ""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    write_atomically(file, yaml.safe_dump(as_dict(recipe), sort_keys=False))
    code = ended([*train, "--recipe", str(file), "--resume"], log, control)
    if control.received:
        raise Interrupted(f"stopped in {folder}; the same command goes on")
    return explained(code, log) if code else (0, "")


def explained(code: int, log: Path) -> tuple[int, str]:
    """A failed run's exit code and what it says is wrong: its refusal, or the last line of its log.

    Some launchers turn every exit code into 1, so what the run said decides whether it was refused.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return code, lines[-1] if lines else "nothing in the log"
    said = takewhile(lambda line: not line.startswith("Traceback"), lines[starts[-1] :])
    return REFUSED, " ".join(said)[len("error: ") :]


def finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a whole run of this very recipe; of another one, the run itself will refuse."""
    manifest, summary = folder / RUN_MANIFEST, folder / RUN_SUMMARY
    return summary.is_file() and manifest.is_file() and json.loads(manifest.read_text())["recipe"] == as_dict(recipe)


def ended(words: Sequence[str], log: Path, control: Control) -> int:
    """Exit code of a process that writes to `log`. A request to stop is passed on to it, once, and its end waited for."""
    with log.open("wb") as stream:
        # a session of its own: Ctrl-C reaches this process only, and the run gets the signal at which it saves
        process = subprocess.Popen(
            words, stdout=stream, stderr=stream, env={**os.environ, STARTED_BY_US: "1"}, start_new_session=True
        )
        told = False
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                control.received = True
            if control.received and not told:
                process.terminate()
                told = True
