"""Samples that turned out bad while running: found once, reported, kept out, counted against a limit."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Iterable
from pathlib import Path

from distill.data.index import ShardIndex
from distill.data.stream import Position

logger = logging.getLogger("distill.data")


class TooManyFaults(RuntimeError):
    """More samples are bad than the run allows; the text has both numbers and the remedy."""


class Quarantine:
    """The bad samples of one split as this process knows them; may be told from several threads.

    `max_bad_rate` is the share of the split's samples that may be bad before the run stops: `ceil(rate * num_samples)` of
    them are allowed, never all. Every newly found sample becomes one JSON line in `report` (if given) and in the log.
    """

    def __init__(self, index: ShardIndex, max_bad_rate: float, rank: int = 0, report: Path | None = None) -> None:
        if not 0 <= max_bad_rate <= 1:
            raise ValueError(f"max_bad_rate {max_bad_rate}: must be a share between 0 and 1")
        self.found_here = 0
        """Samples that this process found bad itself, to be summed over the processes."""
        self._index = index
        # never all of them: nothing would be left to put in their place
        self._allowed = min(math.ceil(max_bad_rate * index.num_samples), max(0, index.num_samples - 1))
        self._rate = max_bad_rate
        self._rank = rank
        self._report = report
        self._bad: set[int] = set()
        self._lock = threading.Lock()

    def __contains__(self, sample: int) -> bool:
        return sample in self._bad

    def samples(self) -> list[int]:
        """The bad samples, sorted: what a checkpoint keeps."""
        with self._lock:
            return sorted(self._bad)

    def update(self, samples: Iterable[int]) -> None:
        """Adds samples that are known to be bad: from a checkpoint or from another process. Raises TooManyFaults."""
        with self._lock:
            self._bad.update(samples)
        self.check("by all processes together")

    def add(self, sample: int, reason: str, position: Position) -> None:
        """Reports a bad sample, unless it is known. Raises TooManyFaults above the limit."""
        with self._lock:
            if sample in self._bad:
                return
            self._bad.add(sample)
            self.found_here += 1
            self._write(self._line(sample, reason, position))
        self.check(f"the last: {reason}")

    def check(self, last: str = "as was said before") -> None:
        """Raises TooManyFaults where more samples are bad than are allowed."""
        count = len(self._bad)
        if count > self._allowed:
            where = f"; they are listed in {self._report}" if self._report else ""
            raise TooManyFaults(
                f"{self._index.place}: {count} of {self._index.num_samples} samples are bad, at most {self._allowed} "
                f"({self._rate:.4%}) are allowed; {last}{where}; run `python shards/prepare.py verify --full` "
                "on it and restore the shards, or raise max_bad_rate"
            )

    def _line(self, sample: int, reason: str, position: Position) -> str:
        record = self._index.records[sample]
        try:
            key = self._index.key(sample)
        except (OSError, ValueError) as error:  # the header is damaged too
            key = f"unreadable header ({type(error).__name__})"
        line = {
            "sample": sample,
            "key": key,
            "shard": self._index.shards[int(record["shard"])].name,
            "offset": int(record["offset"]),
            "reason": reason,
            "epoch": position.epoch,
            "micro_batch": position.micro,
            "rank": self._rank,
        }
        return json.dumps(line, ensure_ascii=False)

    def _write(self, line: str) -> None:
        logger.warning("bad sample: %s", line)
        if self._report is not None:
            with self._report.open("a") as file:
                file.write(line + "\n")
