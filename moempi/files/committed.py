"""How far a run is: what it has committed, counted without taking its lock and without reading any tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moempi.errors import DataError
from moempi.files.completions import PARTIAL, read_head
from moempi.files.output_parts import latest_of, read_parts


@dataclass(frozen=True)
class Committed:
    """Counts over a whole output, whichever runs they come from."""

    sequences: int = 0  # of the input; 0 where nothing is committed yet
    finished: int = 0
    partial: int = 0  # begun and not finished
    new_tokens: int = 0
    complete: bool = False  # the final file is there

    def __str__(self) -> str:
        if not self.sequences:
            return "complete, no sequences" if self.complete else "nothing committed yet"
        partly = f", {self.partial} partly" if self.partial else ""
        state = "; complete" if self.complete else ""
        return f"{self.finished} of {self.sequences} sequences finished{partly}, {self.new_tokens} new tokens{state}"


def committed(output: Path) -> Committed:
    """What an output holds: the file of a finished run, or the commits of one that runs, waits or was killed.

    Raises:
        DataError: what is there is damaged.
    """
    for _ in range(3):
        try:
            return _final(output) if output.exists() else _parts(output)
        except DataError:
            # The run may have merged and removed its parts just now.
            if not output.exists():
                raise
    return _final(output)


def _final(output: Path) -> Committed:
    head = read_head(output)
    begun = len(head.ids) - head.finished
    return Committed(head.origin.n_sequences, head.finished, begun, int(head.lengths.sum()), complete=True)


def _parts(output: Path) -> Committed:
    parts = read_parts(output)
    if not parts:
        return Committed()
    n = parts[0].origin.n_sequences
    latest = latest_of(parts, n)
    begun = latest.part >= 0
    finished = int(np.count_nonzero(begun & (latest.finish_reason != PARTIAL)))
    return Committed(n, finished, int(np.count_nonzero(begun)) - finished, int(latest.length.sum()))
