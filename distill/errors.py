"""How a command ends otherwise than well: the exceptions that `command_line.command` answers with an exit code."""

from __future__ import annotations

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again later. Schedulers can be told to requeue on it."""


class Interrupted(RuntimeError):
    """The run was asked to stop, has saved, and can be resumed."""


class RequestError(ValueError):
    """A request that cannot be served as it was made; the message names each problem and its remedy."""


class Failed(RuntimeError):
    """Work that could not be done for a reason outside of the program; the message has the reason and the remedy."""


class LossError(ValueError):
    """A loss gave something else than its protocol says. The commands report it as a wrong request."""
