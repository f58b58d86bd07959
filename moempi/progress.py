"""A line on how far the job is, every now and then."""

from __future__ import annotations

import logging
import time
from typing import Protocol

log = logging.getLogger("moempi")


class Counts(Protocol):
    """What the router knows of the job."""

    finished: int
    total: int
    new_tokens: int


class Progress:
    """Logs finished sequences and tokens per second.

    Args:
        every: seconds between two lines.
        earlier: sequences that were finished before this run.
    """

    def __init__(self, every: float, earlier: int = 0):
        self._every, self._earlier = every, earlier
        self._begin = time.monotonic()
        self._next = self._begin + every

    def show(self, counts: Counts) -> None:
        """Log a line if one is due."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        rate = counts.new_tokens / (now - self._begin)
        finished, total = self._earlier + counts.finished, self._earlier + counts.total
        log.info("%d of %d sequences finished, %.0f new tokens/s", finished, total, rate)
