"""Reports of a run: metrics.jsonl and summary.json for programs, one progress bar for people, Accelerate's trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from distill.files import RUN_EVENTS, RUN_METRICS, write_atomically


def say(accelerator: Accelerator, text: str) -> None:
    """Prints one line for people, on the main process only, above its progress bar."""
    if accelerator.is_main_process:
        tqdm.write(text)


class Reporter:
    """The reporter of one run. It writes on the main process only; on the others every method but `dump` does nothing."""

    def __init__(self, folder: Path, accelerator: Accelerator, total_steps: int, title: str) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.main = accelerator.is_main_process
        self.metrics_path = folder / RUN_METRICS
        self._total_steps, self._title = total_steps, title
        self._bar: tqdm | None = None

    def start(self, step: int, evaluated_step: int) -> None:
        """Opens the log where the run goes on. Lines after `step`, and evaluations after `evaluated_step`, are cut: a process
        wrote them that was then killed, and they will be written again."""
        if not self.main:
            return
        found = [(line, json.loads(line)) for line in self._lines()]
        kept = [line for line, values in found if values["step"] <= (evaluated_step if "eval/top1" in values else step)]
        write_atomically(self.metrics_path, "".join(kept))
        self._bar = tqdm(
            total=self._total_steps, initial=step, desc=self._title, unit="step", dynamic_ncols=True, mininterval=0.5
        )

    def _lines(self) -> list[str]:
        """The whole lines of the log; a last line that a kill cut short has no line end and is left out."""
        if not self.metrics_path.is_file():
            return []
        return [line for line in self.metrics_path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def advance(self) -> None:
        """Moves the bar by one optimiser step."""
        if self._bar is not None:
            self._bar.update(1)

    def log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes `values` as a line of metrics.jsonl, to the trackers, and to the bar's right end."""
        if not self.main:
            return
        line = {"step": step, "epoch": round(epoch, 6), **values}
        with self.metrics_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(dict(values), step=step)
        if self._bar is not None:
            shown = {
                k.removeprefix("loss/"): v for k, v in values.items() if k.startswith(("loss/", "eval/top1", "images_per"))
            }
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)

    def note(self, event: str, step: int) -> None:
        """Appends a line to events.jsonl: what happened to the run from outside, which its metrics must not depend on."""
        if self.main:
            with (self.folder / RUN_EVENTS).open("a") as file:
                file.write(json.dumps({"event": event, "step": step}) + "\n")

    def say(self, text: str) -> None:
        """Prints one line for people, on the main process only, above the bar."""
        say(self.accelerator, text)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes `content` as FOLDER/name, whole or not at all."""
        if self.main:
            write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")

    def dump(self, name: str, content: Mapping[str, Any]) -> Path:
        """Writes `content` as FOLDER/name, on whichever process it concerns; returns the path."""
        write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")
        return self.folder / name

    def close(self) -> None:
        """Ends the bar and syncs the log."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self.main and self.metrics_path.is_file():
            with self.metrics_path.open("a") as file:
                os.fsync(file.fileno())
