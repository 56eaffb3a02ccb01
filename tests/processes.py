"""Real processes that start fast: a fork server imports the project once, every run is then a fork of it.

Each run is a process (or one per rank, joined by gloo over loopback) that executes `pipelines.imagenet.main`, or another
command's, as its command line would; it can be killed like any other.
"""

import importlib
import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
TRAIN, CACHE = "pipelines.imagenet", "pipelines.cache_teacher"
CONTEXT.set_forkserver_preload([TRAIN, CACHE])


def _enter(command: str, argv: list[str], environment: dict[str, str], log: str, file_limit: int) -> None:
    os.setsid()
    if file_limit:  # a disk that is full after so many bytes, as far as one file is concerned
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from pipelines.setup.launcher import exit_with
    from tests.runs import fp16_on_cpus

    if stall := environment.get("STALL_LOADER"):
        stall_loader(*map(int, stall.split(":")))
    if spoiled := environment.get("SPOIL_LOSS"):
        spoil_loss(*map(int, spoiled.split(":")))

    if environment.get("FP16_ON_CPUS"):
        fp16_on_cpus()

    torch.set_num_threads(1)
    exit_with(lambda: importlib.import_module(command).main(argv))


def stall_loader(rank: int, reads: int) -> None:
    """Lets this rank's storage stop answering after `reads` reads of a sample, as a dead network file system does."""
    from distill.data.reader import SampleReader

    real, left = SampleReader.read, [reads]

    def read(self: SampleReader, sample: int):
        left[0] -= 1
        while left[0] < 0 and os.environ.get("RANK", "0") == str(rank):
            time.sleep(1)
        return real(self, sample)

    SampleReader.read = read  # type: ignore[method-assign]


def spoil_loss(rank: int, call: int) -> None:
    """This rank's cross-entropy is not a number at its call of this number, as one absurd image makes it."""
    from distill.losses.cross_entropy import CrossEntropy

    real, calls = CrossEntropy.forward, [0]

    def forward(self: CrossEntropy, *arguments):
        value, statistics = real(self, *arguments)
        calls[0] += 1
        spoiled = calls[0] == call and os.environ.get("RANK", "0") == str(rank)
        return (value * float("nan") if spoiled else value), statistics

    CrossEntropy.forward = forward  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Job:
    """The processes of one run, by rank, and what they print."""

    ranks: list[BaseProcess]
    log: Path

    def wait(self, seconds: float = 180) -> list[int | None]:
        """Exit codes by rank; what still runs then is killed (-9)."""
        end = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
        self.kill()
        return [rank.exitcode for rank in self.ranks]

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()

    def is_over(self) -> bool:
        """A rank has ended, so the others end too, or wait for it."""
        return not all(rank.is_alive() for rank in self.ranks)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Returns as soon as `condition` holds; fails if the job ends or the time is over first."""
        end = time.monotonic() + seconds
        while not condition():
            # asked once more after the end was seen: the last thing a job did may be what is waited for
            if (time.monotonic() > end or self.is_over()) and not condition():
                alive = [rank.is_alive() for rank in self.ranks]
                self.kill()
                raise AssertionError(f"it never came to that (alive: {alive}):\n{self.text()}")
            time.sleep(0.02)

    def text(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""


def start(
    argv: Sequence[str],
    log: Path,
    world_size: int = 1,
    environment: dict[str, str] | None = None,
    file_limit: int = 0,
    command: str = TRAIN,
) -> Job:
    """Starts `pipelines/imagenet.py ARGV` on `world_size` CPU processes that can write files of `file_limit` bytes (0: any)."""
    ranks = []
    for own in rank_environments(world_size):
        shared = {**own, **(environment or {})}
        ranks.append(CONTEXT.Process(target=_enter, args=(command, list(argv), shared, str(log), file_limit)))
        ranks[-1].start()
    return Job(ranks, log)


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """What a launcher sets for each of `world_size` CPU processes of this machine."""
    shared = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if world_size == 1:
        return [shared]
    size = str(world_size)
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def finished(
    argv: Sequence[str],
    log: Path,
    world_size: int = 1,
    codes: int = 0,
    environment: dict[str, str] | None = None,
    command: str = TRAIN,
) -> Job:
    """A job that was started and is over; fails with its output unless every rank exits with `codes`."""
    job = start(argv, log, world_size, environment, command=command)
    found = job.wait()
    assert found == [codes] * world_size, f"exit codes {found}:\n{job.text()}"
    return job
