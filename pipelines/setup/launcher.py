"""The two ends of a command's process: it dies with its launcher, and its exit code is the one that was meant. Imports nothing
heavy: it comes before the imports."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from distill.children import end_with_parent

STARTED_BY_US = "DISTILL_STARTED"
"""Variable that a command of this project sets for the runs it starts."""

UNDER_A_LAUNCHER = {"LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", STARTED_BY_US}
"""Variables that torchrun, `accelerate launch` and our own commands set for the processes they start."""


def end_with_launcher() -> None:
    """Asks Linux to send this process SIGTERM when its launcher dies: an orphan would keep the run's folder, or wait for
    minutes for a rendezvous that the launcher held. Later the run takes SIGTERM as a request to save and stop.

    Does nothing for a process that nobody launched: a shell that somebody logs out of is no launcher.
    """
    if UNDER_A_LAUNCHER & os.environ.keys():
        end_with_parent(signal.SIGTERM)


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the code that `main` returns, or with 1 and the traceback of what it raises.

    A process group that `main` left behind, because a peer is lost or another error came first, is not torn down: its threads
    and destructors may wait for a process that is gone, or abort and change the code. After a Ctrl-C no thread is waited for:
    one whose start was interrupted is known to nobody, and would wait for work for ever. The system takes back what is held.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    distributed = sys.modules.get("torch.distributed")
    left = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if not left and code != 128 + signal.SIGINT:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
