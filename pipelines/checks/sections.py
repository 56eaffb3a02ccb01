"""The sections of an examination: what each looks at, how long it may take, and whether it is one of the short ones."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """One section; it runs in a process of its own."""

    title: str
    find: str
    """`module.function` of this package: a process imports what its own section needs."""
    seconds: float
    """Time after which it is ended; it is several times what the section takes."""
    full: bool = False
    """Whether only `--full` makes it."""
    pictures: bool = True
    """Whether it needs shards."""


SECTIONS: dict[str, Section] = {
    "versions": Section("Versions", "versions.versions", 60, pictures=False),
    "gpus": Section("GPUs and precision", "machine.gpus", 60, pictures=False),
    "launcher": Section("Launcher", "machine.launcher", 60, pictures=False),
    "host": Section("Host", "host.host", 60),
    "storage": Section("Disk and shards", "host.storage", 120),
    "network": Section("Between the processes", "machine.network", 120, pictures=False),
    "decoding": Section("Decoding", "decoding.decoding", 240),
    "pixels": Section("Pixels of the device's graph", "decoding.pixels", 180, full=True),
    "ownership": Section("Batches in use while the next are made", "decoding.ownership", 120, full=True),
    "losses": Section("Losses against the authors' values", "runs.losses", 240, full=True),
    "steps": Section("Poisoned steps, fp16, waiting of the host", "steps.steps", 240, full=True),
    "memory": Section("Out of memory", "steps.memory", 120, full=True),
    "resume": Section("Interrupted and resumed", "runs.resume", 300, full=True),
    "launchers": Section("Launchers that do not fit", "runs.launchers", 240, full=True),
    "evaluation": Section("Evaluation", "runs.evaluation", 240, full=True),
    "cache": Section("A teacher cache", "runs.cache", 240, full=True),
    "speed": Section("Speed", "runs.speed", 300, full=True),
}
"""In the order in which they are made."""
