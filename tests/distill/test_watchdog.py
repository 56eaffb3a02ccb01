"""The watchdog's threads end with it, and a process that waits learns of one that died."""

import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import torch
from torch import distributed

import distill.watchdog
from distill.nonfinite import Guard, Suspect, _Pending
from tests.processes import CONTEXT, free_port


def beat_and_close() -> None:
    distill.watchdog.PERIOD = 0.0  # the heartbeat is inside the store nearly all the time
    store = distributed.TCPStore("127.0.0.1", 0, 1, True)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    watchdog = distill.watchdog.Watchdog(0, 2, timeout=60).start()
    time.sleep(0.2)
    watchdog.close()
    sys.exit(threading.active_count() - 1)


def test_no_thread_of_a_closed_watchdog_is_left():
    """One that came back from the store while the interpreter ended aborted the process now and then, after a finished run
    (signal 6, `terminate called without an active exception`)."""
    process = CONTEXT.Process(target=beat_and_close)
    process.start()
    process.join()
    assert process.exitcode == 0


class NeverReady:
    """The event of an all-reduce on a GPU whose other end is gone."""

    def query(self) -> bool:
        return False


def wait_for_a_step_of_the_dead(rank: int, port: int, said: str, both: "multiprocessing.synchronize.Barrier") -> None:
    distill.watchdog.PERIOD, distill.watchdog.LOST = 0.05, 2.0
    store = distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    watchdog = distill.watchdog.Watchdog(rank, 2, timeout=600, exit=os._exit).start()
    watchdog.progress(7, "optimiser step")
    while 1 - rank not in watchdog._peers:
        time.sleep(0.01)
    both.wait()
    if rank == 1:
        os._exit(0)
    guard = Guard(torch.optim.SGD([torch.zeros(1)]), None, lambda tensor: tensor, waiting=watchdog.check)
    guard._pending = _Pending(Suspect(7, {}, []), torch.zeros(()), NeverReady())
    try:
        guard.settle()
    except distill.watchdog.PeerLostError as error:
        Path(said).write_text(str(error))
    os._exit(0)


def test_a_host_that_waits_for_the_device_learns_which_process_died(tmp_path: Path):
    """NCCL says nothing of it: the wait was over when the watchdog ended the process, after ten minutes, without a name."""
    said, both, port = tmp_path / "said", CONTEXT.Barrier(2), free_port()
    ranks = [CONTEXT.Process(target=wait_for_a_step_of_the_dead, args=(r, port, str(said), both)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert said.read_text().startswith("step 7, optimiser step: gone: rank 1; the last checkpoint is intact")


def test_a_process_whose_shard_comes_nearer_is_let_wait_and_so_are_those_that_wait_for_it():
    """A shard of 140 MB over a slow line takes longer than the time-out; the step of the others stands still meanwhile."""
    ended, arrived = [], [0]

    def waiting() -> str:
        arrived[0] += arrived[0] < 12
        return f"shard 7, {arrived[0]} of 12 MB"

    watchdog = distill.watchdog.Watchdog(0, 1, timeout=0.4, exit=lambda code: ended.append(arrived[0]))
    other = distill.watchdog.Watchdog(1, 2, timeout=0.4)
    watchdog.waiting = waiting
    watchdog.progress(3, "waiting for data")
    other._peers[0] = (distill.watchdog.Beat(3, "waiting for data", 0.1, 1), time.monotonic())
    assert other._ages()[0] < 0.4
    watchdog.start()
    while not ended:
        time.sleep(0.05)
    watchdog.close()
    assert ended == [12], "it looks every 0.1 s: 12 looks are thrice the time-out"
    assert "waiting for data (shard 7, 12 of 12 MB)" in watchdog.report(0.5)
