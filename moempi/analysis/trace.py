"""A trace as the questions see it: its columns as arrays, read when they are first asked for."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.trace import fill_from_parts
from moempi.files.trace_checks import check_column, check_load, check_tables, checked_shape
from moempi.files.trace_columns import LEGENDS, groups_of
from moempi.recorder import LEVELS

Open = Callable[[], AbstractContextManager[h5py.File]]
Check = Callable[[str, str, np.ndarray], None]


class Columns(Mapping[str, np.ndarray]):
    """The columns of one group of the trace, all of the same length; each is read once, when it is asked for."""

    def __init__(self, open_file: Open, group: str, check: Check) -> None:
        self._open, self._group, self._check = open_file, group, check
        self._read: dict[str, np.ndarray] = {}
        with open_file() as file:
            self._names = tuple(file[group])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(f"/{self._group} has no column {name!r}; it has {', '.join(self._names)}")
        if name not in self._read:
            with self._open() as file:
                data = file[self._group][name][...]
            self._check(self._group, name, data)
            self._read[name] = data
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Trace:
    """A trace that was loaded; docs name the columns of each group, `moempi.files.trace_columns.COLUMNS` lists them.

    Attributes:
        level: how much was recorded; one of LEVELS.
        mode: "exact" or "fast"; "" where the run did not say.
        n_ranks, n_layers, n_experts, top_k: N, L (all layers, also those without experts), E and K.
        unfinished: whether this is what the parts of a run hold that never merged them.
    """

    def __init__(self, path: Path, open_file: Open, again: Open, *, unfinished: bool) -> None:
        self.path, self.unfinished = path, unfinished
        self._open = again
        with open_file() as file:
            self.level, self.mode = schema.text_attribute(file, "level"), schema.text_attribute(file, "mode")
            if self.level not in LEVELS:
                raise DataError(f"{path}: level is {self.level!r}; expected one of {', '.join(LEVELS)}")
            shape = checked_shape(file.attrs, path)
            check_tables(file, path, self.level, shape)
            _check_words(path, file)
        self.n_ranks, self.n_layers, self.n_experts, self.top_k = shape
        self._check = partial(check_column, shape=shape, path=path)

    @cached_property
    def wall(self) -> Columns:
        """rank, begin, end, time in ns: a row for each rank that has begun to work."""
        return self._columns("wall", "summary")

    @cached_property
    def sums(self) -> Columns:
        """rank, phase, stage, layer, count, time in ns, tokens: a row for each that something was recorded for."""
        return self._columns("sums", "summary")

    @cached_property
    def traffic(self) -> Columns:
        """kind, layer, source, destination, rows, bytes, messages; as the senders counted."""
        return self._columns("traffic", "summary")

    @cached_property
    def received(self) -> Columns:
        """The same as the receivers counted, without what stayed on its rank."""
        return self._columns("received", "summary")

    @cached_property
    def sizes(self) -> Columns:
        """rank, kind, size_class, messages."""
        return self._columns("sizes", "summary")

    @cached_property
    def waits(self) -> Columns:
        """rank, peer, answers, answer_time, waits, wait_time, exposed_time; times in ns."""
        return self._columns("waits", "summary")

    @cached_property
    def spans(self) -> Columns:
        """Every span, with begin and end in ns since the job's start; from level full."""
        return self._columns("spans", "full")

    @cached_property
    def routes(self) -> Columns:
        """Every token's experts and weights; level routes."""
        return self._columns("routes", "routes")

    @cached_property
    def clocks(self) -> Columns:
        """offset, drift and error of every rank's clock; ns, ns per ns, ns."""
        return Columns(self._open, "clocks", self._check)

    @cached_property
    def load(self) -> np.ndarray:
        """Tokens per layer and expert, int64 [L, E]; a token counts once for each of its K experts."""
        with self._open() as file:
            return check_load(file["load"][...], self.path)

    @cached_property
    def load_by_rank(self) -> np.ndarray | None:
        """The same by the rank of the gate, int64 [N, L, E]; None where that was too large to be kept."""
        with self._open() as file:
            return check_load(file["load_by_rank"][...], self.path) if "load_by_rank" in file else None

    @cached_property
    def ranks(self) -> list[dict[str, Any]]:
        """What is known of each rank: node and the like."""
        with self._open() as file:
            group = file["ranks"]
            names = [name for name in group if not name.endswith("_offsets")]
            columns = {name: _column(group, name) for name in names}
        for name, column in columns.items():
            if len(column) != self.n_ranks:
                raise DataError(f"{self.path}: /ranks/{name} has {len(column)} entries; expected {self.n_ranks}")
        return [{name: column[rank] for name, column in columns.items()} for rank in range(self.n_ranks)]

    @cached_property
    def job(self) -> dict[str, Any]:
        """The effective job; {} where it is not known."""
        return self._json("job")

    @cached_property
    def run(self) -> dict[str, Any]:
        """What the run measured of itself."""
        return self._json("run")

    def _columns(self, group: str, level: str) -> Columns:
        if group not in groups_of(self.level):
            raise DataError(
                f"{self.path}: recorded with trace.level = {self.level!r}, which has no {group}; they need {level!r}"
            )
        return Columns(self._open, group, self._check)

    def _json(self, name: str) -> dict[str, Any]:
        with self._open() as file:
            text = schema.read_text(file, name) if name in file else ""
        try:
            found = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: /{name} is not JSON: {error}") from None
        return found if isinstance(found, dict) else {}


def _check_words(path: Path, file: h5py.File) -> None:
    """Refuse numbers that stand for other words than here: a version that had other stages wrote them."""
    for group in ("sums", "traffic"):
        for name in LEGENDS.keys() & file.get(group, {}).keys():
            found, expected = schema.text_attribute(file[group][name], "legend"), ",".join(LEGENDS[name])
            if found != expected:
                raise DataError(
                    f"{path}: /{group}/{name} stands for {found or 'unknown words'}; this version knows {expected}. "
                    "Read it with the version that wrote it"
                )


def _column(group: h5py.Group, name: str) -> list[Any]:
    if f"{name}_offsets" in group:
        return schema.read_ragged_text(group, name)
    values: list[Any] = group[name][...].tolist()
    return values


def load(path: str | Path) -> Trace:
    """Load a trace; of a run that did not end, what its parts hold.

    Raises:
        DataError: neither is there, or they are damaged.
    """
    path = Path(path)
    if path.exists():
        open_file = partial(schema.open_file, path, "trace")
        return Trace(path, open_file, partial(open_file, walked=True), unfinished=False)
    # The parts are merged as they would have been, but into memory.
    merged = h5py.File(io.BytesIO(), "w")
    fill_from_parts(merged, path)
    return Trace(path, lambda: nullcontext(merged), lambda: nullcontext(merged), unfinished=True)
