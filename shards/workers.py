"""Runs shard jobs on processes of this machine or on Ray; a killed worker costs a retry, not the preparation."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from shards.existing import index_shard
from shards.jobs import Job, ShardJob, ShardResult
from shards.upload import upload_shard
from shards.writer import write_shard

ATTEMPTS = 3
"""Pools that may break (a worker was killed) before the preparation gives up; with Ray, retries of a shard."""

Runner = Callable[[Sequence[Job]], Iterator[ShardResult]]
"""Runs jobs and gives their results in the order in which they finish."""


class WorkersLost(RuntimeError):
    """Workers keep dying; the text says how often."""


def run_job(job: Job) -> ShardResult:
    """Makes one shard, and uploads it where that is asked, or indexes one."""
    if not isinstance(job, ShardJob):
        return index_shard(job)
    result = write_shard(job)
    return upload_shard(job, result) if job.upload else result


def run_jobs(jobs: Sequence[Job], workers: int = 1) -> Iterator[ShardResult]:
    """The result of every job, in the order in which they finish, from so many processes of this machine.

    Raises what a job raises, after the jobs that run have finished, and WorkersLost where workers die `ATTEMPTS` times.
    """
    if workers == 1:
        yield from map(run_job, jobs)
        return
    left = {job.number: job for job in jobs}
    for _ in range(ATTEMPTS):
        try:
            for result in _pool(list(left.values()), workers):
                del left[result.number]
                yield result
        except BrokenProcessPool:
            continue  # finished shards have their markers, so only what is left runs again
        return
    raise WorkersLost(
        f"workers were killed {ATTEMPTS} times with {len(left)} shards left (out of memory?); use fewer --workers"
    )


def _pool(jobs: Sequence[Job], workers: int) -> Iterator[ShardResult]:
    """A spawned pool: forked workers would inherit locks and threads of whatever imported this."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        # workers start with the mask of who starts them: a Ctrl-C would print the traceback of whatever they import
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures = [pool.submit(run_job, job) for job in jobs]
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int) -> None:
    """Lets a worker end with its parent, which it would otherwise outlive, and at a Ctrl-C without a word: the preparation says
    what there is to say."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def run_jobs_on_ray(jobs: Sequence[Job], address: str | None = None) -> Iterator[ShardResult]:
    """The result of every job from the Ray cluster at `address` (None starts one here).

    The source, the output and this repository must lie at the same paths on all its machines. A job is retried `ATTEMPTS`
    times where its worker dies or the disk fails. Raises ValueError where Ray is not installed, else as `run_jobs`.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--engine ray: the ray package is not installed; install it, or leave --engine out") from error
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    search = os.pathsep.join(path for path in paths if path)  # added to: a worker without the driver's paths never starts
    ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": search}}, log_to_driver=False)
    try:
        remote = ray.remote(max_retries=ATTEMPTS, retry_exceptions=[OSError])(run_job)
        waiting = [remote.remote(job) for job in jobs]
        while waiting:
            done, waiting = ray.wait(waiting)
            try:
                yield ray.get(done[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error  # the job's own error, as the local engine raises it
            except ray.exceptions.WorkerCrashedError as error:
                raise WorkersLost(f"workers were killed {ATTEMPTS + 1} times on one shard (out of memory?)") from error
    finally:
        ray.shutdown()
