"""The watchdog's threads end with it."""

import sys
import threading
import time

from torch import distributed

import distill.watchdog
from tests.processes import CONTEXT


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
