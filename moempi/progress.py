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
    """

    def __init__(self, every: float):
        self._every = every
        self._begin = time.monotonic()
        self._next = self._begin + every

    def show(self, counts: Counts) -> None:
        """Log a line if one is due."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        rate = counts.new_tokens / (now - self._begin)
        log.info("%d of %d sequences finished, %.0f new tokens/s", counts.finished, counts.total, rate)
