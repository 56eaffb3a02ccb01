"""A process that ends with its launcher, from its first moment on. Imports nothing heavy: it comes before the imports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

STARTED_BY_US = "DISTILL_STARTED"
"""Variable that a command of this project sets for the runs it starts."""

UNDER_A_LAUNCHER = {"LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", STARTED_BY_US}
"""Variables that torchrun, `accelerate launch` and our own commands set for the processes they start."""

PR_SET_PDEATHSIG = 1
"""Constant of <sys/prctl.h>: a signal for this process when its parent dies."""


def end_with_launcher() -> None:
    """Asks Linux to send this process SIGTERM when its launcher dies: an orphan would keep the run's folder, or wait for
    minutes for a rendezvous that the launcher held. Later the run takes SIGTERM as a request to save and stop.

    Does nothing for a process that nobody launched: a shell that somebody logs out of is no launcher.
    """
    if sys.platform != "linux" or not UNDER_A_LAUNCHER & os.environ.keys():
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died in between, and nothing will be sent
        sys.exit(1)
