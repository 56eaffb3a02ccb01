"""A process that ends with its parent. Imports nothing heavy: launched commands ask for it before their imports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Constant of <sys/prctl.h>: a signal for this process when its parent dies."""


def end_with_parent(number: signal.Signals) -> None:
    """Asks Linux to send this process a signal when its parent dies; ends it at once where that has happened already. Does
    nothing on other systems."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died in between, and nothing will be sent
        sys.exit(1)
