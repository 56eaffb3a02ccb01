"""Objects that a command writes to its stdout: `pipe:COMMAND {}`."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from typing import IO

from distill.children import last_error
from distill.data.remote.fetch import UNKNOWN, Busy, Facts, Replaced, Trip, retried, write_all


class PipeRemote:
    """Objects that a command writes to its stdout; `{}` in it is the object's name, quoted for the shell.

    It gives no ETag, so that sizes and checksums are all that tells a replaced object.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._command = url.removeprefix("pipe:").strip()
        if "{}" not in self._command:
            raise ValueError(f"{url}: has no {{}} for the name of the object, as in `pipe:aws s3 cp s3://bucket/train/{{}} -`")

    def facts(self, name: str) -> Facts:
        """Nothing: a command says no more than the bytes."""
        return Facts(UNKNOWN)

    def listing(self) -> None:
        """None: nothing lists."""
        return None

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """The command's output from its beginning; after a failure the command runs again."""
        retried(lambda: self._copy(name, facts.size, file, trip), trip.stop)

    def _copy(self, name: str, size: int, file: int, trip: Trip) -> None:
        trip.advance(-trip.arrived)
        command = self._command.replace("{}", shlex.quote(name))
        with tempfile.TemporaryFile("w+", errors="replace") as err:
            child = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=err, start_new_session=True)
            try:
                assert child.stdout is not None
                self._write(child.stdout, size, file, trip)
                code = child.wait()
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, 9)
                    child.wait()
                if child.stdout is not None:
                    child.stdout.close()
            err.seek(0)
            said = last_error(err.read()) or "nothing on stderr"
        if code:
            raise Busy(f"exit code {code} of {command}: {said}")
        if size < 0:
            os.ftruncate(file, trip.arrived)  # a try that failed may have written more
        if size >= 0 and trip.arrived != size:
            raise Busy(f"{trip.arrived} bytes came instead of {size} from {command}: {said}")

    def _write(self, output: IO[bytes], size: int, file: int, trip: Trip) -> None:
        while (block := output.read(1 << 20)) and not trip.stop.is_set():
            if 0 <= size < trip.arrived + len(block):
                raise Replaced(f"{self.url}: gives more than the {size} bytes that were indexed; index the shards again")
            write_all(file, block, trip.arrived)
            trip.advance(len(block))
