"""A thread that writes a rank's parts of the trace, so that the rank goes on meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moempi.errors import DataError
from moempi.files.trace import write_part
from moempi.recorder import PARTS_HELD


class TraceWriter:
    """Writes what a recorder gave as part files, from a thread of its own; no MPI.

    One part waits at most while another is written. An error of the thread is raised by the next `put` or `close`, as a
    DataError.

    Args:
        path: the trace.
        about: as of `write_part`.
    """

    def __init__(self, path: Path, rank: int, about: Mapping[str, Any]) -> None:
        self.written = 0  # parts
        self._path, self._rank, self._about = path, rank, dict(about)
        self._waiting: queue.Queue[dict[str, np.ndarray] | None] = queue.Queue(PARTS_HELD - 2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="trace", daemon=True)
        self._thread.start()

    def put(self, arrays: dict[str, np.ndarray]) -> None:
        """Hand over the arrays of `Recorder.take`; waits where one waits already. {} (level off) is nothing."""
        self._raise_error()
        if arrays:
            self._waiting.put(arrays)

    def close(self) -> int:
        """Wait until all is written; returns the number of parts, which `merge_trace` checks."""
        self._waiting.put(None)
        self._thread.join()
        self._raise_error()
        return self.written

    def _raise_error(self) -> None:
        if self._error is not None:
            raise DataError(f"{self._path}: the trace could not be written: {self._error}") from self._error

    def _work(self) -> None:
        try:
            while (arrays := self._waiting.get()) is not None:
                write_part(self._path, self._rank, self.written + 1, arrays, self._about)
                self.written += 1
        except BaseException as error:
            self._error = error
            # Whoever waits for room must get it, to be told.
            while self._waiting.get() is not None:
                pass
