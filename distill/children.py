"""Processes that are started to be watched: how a child is run to its end, how it ends with its parent, and how a command ends
at a Ctrl-C before it works.

Imports nothing heavy: commands ask for it before their imports.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

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


def end_at_interrupt() -> None:
    """Ends this process at a Ctrl-C, with one line and exit code 130, until its command begins to work.

    The imports of a command take seconds. A KeyboardInterrupt inside of them would print their traceback, or come out as an
    error of a library that could not be loaded. Where SIGINT is ignored, as in a shell's background, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def begin_work() -> None:
    """Gives Ctrl-C back to Python where `end_at_interrupt` has it: from now on something may have to be cleaned up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.write(2, b"interrupted\n")  # no print: the signal may have come in the middle of one
    os._exit(128 + number)


def run_child(command: Sequence[str], seconds: float, environment: Mapping[str, str] = os.environ) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that can import this package; SIGKILL ends it, and all that it started, after
    `seconds`."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH", "")]))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # files, not pipes: a child that the driver keeps from dying would keep pipes open too
        shown = {**environment, "PYTHONPATH": path}
        child = subprocess.Popen(command, stdout=out, stderr=err, env=shown, start_new_session=True)
        try:
            code = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            try:
                code = child.wait(10)
            except subprocess.TimeoutExpired:  # inside a system call that does not end
                code = -signal.SIGKILL
        except BaseException:  # an interrupted parent leaves no child behind
            os.killpg(child.pid, signal.SIGKILL)
            raise
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def last_error(err: str, length: int = 300) -> str:
    """What stderr ends with, in one line: from the last exception on, whose text has many lines in DALI; else its last line."""
    lines = err.strip().splitlines()
    raised = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
    return " ".join(lines[raised[-1] :] if raised else lines[-1:])[:length]
