"""Adding up what the parts of a trace counted, a rank at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

from moempi.files import schema
from moempi.files.trace_columns import KEYS, OWNER, ends_of, values_of

LARGEST_LOAD_BY_RANK = 2**22  # numbers in /load_by_rank, beyond which it is left out


class Counters:
    """The counters of one rank over all its parts.

    Args:
        meta: of the trace, with `n_ranks` and `n_layers`.
    """

    def __init__(self, rank: int, meta: Mapping[str, Any]) -> None:
        self._rank = rank
        self._ends = ends_of(int(meta["n_ranks"]), int(meta["n_layers"]))
        self._keys = {group: np.empty((len(keys), 0), dtype=np.int64) for group, keys in KEYS.items()}
        self._totals = {group: np.empty((len(values_of(group)), 0), dtype=np.int64) for group in KEYS}

    def add(self, part: h5py.File) -> None:
        """Add the counters of a part.

        Raises:
            ValueError: it counts something that there is none of.
        """
        for group, names in KEYS.items():
            keys = np.stack([part[group][name][...].astype(np.int64) for name in names])
            for name, column in zip(names, keys, strict=True):
                self._check(group, name, column)
            values = np.stack([part[group][name][...] for name in values_of(group)])
            self._add(group, keys, values)

    def _check(self, group: str, name: str, column: np.ndarray) -> None:
        first = -1 if name == "layer" else 0
        if len(column) and not first <= column.min() <= column.max() < self._ends[name]:
            raise ValueError(f"/{group}/{name} has {column.min()} to {column.max()}; ends at {self._ends[name] - 1}")

    def _add(self, group: str, keys: np.ndarray, values: np.ndarray) -> None:
        joined = np.concatenate([self._keys[group], keys], axis=1)
        found, place = np.unique(joined, axis=1, return_inverse=True)
        totals = np.zeros((len(values), found.shape[1]), dtype=np.int64)
        for total, old, new in zip(totals, self._totals[group], values, strict=True):
            np.add.at(total, place.ravel(), np.concatenate([old, new]))
        self._keys[group], self._totals[group] = found, totals

    def columns(self) -> dict[str, dict[str, np.ndarray]]:
        """Rows of every group, by the names of the merged file."""
        made = {}
        for group, names in KEYS.items():
            keys, totals = self._keys[group], self._totals[group]
            owner = {OWNER[group]: np.full(keys.shape[1], self._rank)}
            made[group] = owner | dict(zip((*names, *values_of(group)), [*keys, *totals], strict=True))
        return made


class Wall:
    """From when to when one rank worked, over all its parts."""

    def __init__(self) -> None:
        self._begin: list[int] = []
        self._end: list[int] = []
        self._time = 0

    def add(self, part: h5py.File) -> None:
        """Go on with the next part.

        Raises:
            ValueError: its times are no whole numbers, or more than one of each.
        """
        columns = [part[f"wall/{name}"][...] for name in ("begin", "end", "time")]
        shapes, kinds = {column.shape for column in columns}, {column.dtype.kind for column in columns}
        if shapes not in ({(0,)}, {(1,)}) or not kinds <= {"i", "u"}:
            found = ", ".join(f"{column.dtype} {list(column.shape)}" for column in columns)
            raise ValueError(f"/wall has {found}; expected whole numbers, at most one of each")
        begin, end, time = columns
        self._begin += begin.tolist()
        self._end += end.tolist()
        self._time += int(time.sum())

    def times(self) -> np.ndarray:
        """int64 [0 or 1, 3]: begin and end on the rank's clock, time between them; nothing if it never began."""
        ends = [[min(self._begin), max(self._end), self._time]] if self._begin else []
        return np.array(ends, dtype=np.int64).reshape(-1, 3)


class Load:
    """Tokens per layer and expert, in all and by the rank whose gate chose them."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        shape = tuple(int(meta[name]) for name in ("n_ranks", "n_layers", "n_experts"))
        self._total = np.zeros(shape[1:], dtype=np.int64)
        self._by_rank = np.zeros(shape, dtype=np.int64) if np.prod(shape) <= LARGEST_LOAD_BY_RANK else None

    def add(self, rank: int, load: np.ndarray) -> None:
        """Add int64 [L, E] of a rank."""
        self._total += load
        if self._by_rank is not None:
            self._by_rank[rank] += load

    def write(self, file: h5py.File) -> None:
        """Write /load, and /load_by_rank where that is not huge."""
        text = "tokens per layer and expert; a token counts once for each of its experts"
        schema.write_column(file, "load", self._total, text=text)
        if self._by_rank is not None:
            schema.write_column(file, "load_by_rank", self._by_rank, text=f"{text}; by the rank of the gate")
