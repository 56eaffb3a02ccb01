"""The sections of an examination: what each looks at, how long it may take, and whether it is one of the short ones."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """One section; it runs in a process of its own."""

    title: str
    find: str
    """`module.function` of this package: a process imports what its own section needs."""
    seconds: float
    """Time after which it is ended."""
    full: bool = False
    """Whether only `--full` makes it."""


SECTIONS: dict[str, Section] = {
    "versions": Section("Versions", "machine.versions", 60),
    "gpus": Section("GPUs and precision", "machine.gpus", 60),
    "launcher": Section("Launcher", "machine.launcher", 60),
    "host": Section("Host", "host.host", 60),
    "storage": Section("Disk and shards", "host.storage", 60),
    "network": Section("Between the processes", "machine.network", 60),
    "decoding": Section("Decoding", "decoding.decoding", 120),
    "pixels": Section("Pixels of the device's graph", "decoding.pixels", 90, full=True),
    "ownership": Section("Batches in use while the next are made", "decoding.ownership", 60, full=True),
    "losses": Section("Losses against the authors' values", "runs.losses", 150, full=True),
    "steps": Section("Poisoned steps, fp16, waiting of the host", "steps.steps", 120, full=True),
    "memory": Section("Out of memory", "steps.memory", 60, full=True),
    "resume": Section("Interrupted and resumed", "runs.resume", 150, full=True),
    "launchers": Section("Launchers that do not fit", "runs.launchers", 90, full=True),
    "evaluation": Section("Evaluation", "runs.evaluation", 60, full=True),
    "speed": Section("Speed", "runs.speed", 240, full=True),
}
"""In the order in which they are made. Their seconds are limits, not estimates."""
