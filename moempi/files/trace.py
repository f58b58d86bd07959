"""The trace file: what every rank noted down, written as parts while the job runs and merged by rank 0 at its end.

    /spans/{rank,stage,layer,microbatch,step,peer,begin,end,tokens,bytes}      from level full
    /routes/{rank,microbatch,step,layer,sequence,position,experts,weights}     level routes
    /sums/{rank,stage,layer,count,time}     /traffic/{kind,layer,source,destination,rows,bytes,messages}
    /load [L, E]     /load_by_rank [N, L, E], where that is not huge
    /clocks/{rank,offset,error}     /ranks/{rank,...}
    /job, /environment, /run, /sources as JSON text; attributes level, mode, n_ranks, n_layers, n_experts, top_k

begin and end are ns since the job's start, on rank 0's clock. Rows of one rank are in the order in which it noted them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files import schema
from moempi.files.parts import Column, committed_parts, make_folder, parts_folder, remove_parts
from moempi.recorder import KINDS, LEVELS, STAGES

PATTERN = "rank-*.h5"
SHAPE = ("n_ranks", "n_layers", "n_experts", "top_k")
_LARGEST_LOAD_BY_RANK = 2**22  # numbers in /load_by_rank, beyond which it is left out

# Columns of the merged file: name -> type, units, long name. A row of experts and weights is top_k wide.
_PLACE = {
    "rank": ("i4", "", "rank"),
    "layer": ("i2", "", "layer of the model; -1: none"),
    "microbatch": ("i4", "", "microbatch slot on the rank; -1: none"),
    "step": ("i4", "", "forward step of the rank; -1: none"),
}
COLUMNS: dict[str, dict[str, tuple[str, str, str]]] = {
    "spans": {
        **_PLACE,
        "stage": ("i2", "", "what was done"),
        "peer": ("i4", "", "the other rank; -1: none"),
        "begin": ("i8", "ns", "begin, since the job's start on rank 0's clock"),
        "end": ("i8", "ns", "end, since the job's start on rank 0's clock"),
        "tokens": ("i8", "", "tokens or rows"),
        "bytes": ("i8", "bytes", "bytes that were moved"),
    },
    "sums": {
        "rank": _PLACE["rank"],
        "stage": ("i2", "", "what was done"),
        "layer": _PLACE["layer"],
        "count": ("i8", "", "spans"),
        "time": ("i8", "ns", "sum of their durations"),
    },
    "traffic": {
        "kind": ("i1", "", "dispatch or answer"),
        "layer": _PLACE["layer"],
        "source": ("i4", "", "rank that sent"),
        "destination": ("i4", "", "rank that received"),
        "rows": ("i8", "", "token rows"),
        "bytes": ("i8", "bytes", "bytes of these rows and their headers"),
        "messages": ("i8", "", "messages; rows that stay on their rank need none"),
    },
    "routes": {
        **_PLACE,
        "sequence": ("i8", "", "row of the input"),
        "position": ("i4", "", "place in the sequence"),
        "experts": ("i2", "", "experts of the token, in the order of the gate"),
        "weights": ("f4", "", "their weights"),
    },
}
_WIDE = ("experts", "weights")
_LEGENDS = {"stage": STAGES, "kind": KINDS}


@dataclass(frozen=True)
class Clocks:
    """How the ranks' clocks (time.perf_counter_ns) relate to rank 0's, in ns."""

    start: int  # the job's start on rank 0's clock
    offset: np.ndarray  # int64 [N], rank's clock - rank 0's
    error: np.ndarray  # int64 [N], bound of the offset's error; -1: not known


def groups_of(level: str) -> tuple[str, ...]:
    """The groups of columns that a trace of a level has."""
    depth = LEVELS.index(level)
    return ("sums", "traffic", *(("spans",) if depth >= 2 else ()), *(("routes",) if depth >= 3 else ()))


# ---------------------------------------------------------------- part files


def write_part(
    path: Path, rank: int, number: int, arrays: Mapping[str, np.ndarray], about: Mapping[str, int | str]
) -> None:
    """Write what a recorder gave as `<trace>.parts/rank-<rank>-<number>.h5`; complete or not there, after any crash.

    Args:
        path: the trace that the part belongs to.
        number: counts this rank's parts, from 1.
        arrays: from `Recorder.take`.
        about: `Recorder.describe`, and what is known when the job starts: `mode`, `job` (JSON text), `start`, `offset`
            and `error` of this rank's clock. It makes the parts readable when the job never gets to merge them.

    Raises:
        DataError: it cannot be written.
    """
    make_folder(parts_folder(path))
    with schema.create(parts_folder(path) / f"rank-{rank:05d}-{number:06d}.h5", "trace-part") as file:
        file.attrs["rank"] = rank
        schema.write_text(file, "about", json.dumps(dict(about)))
        for name, data in arrays.items():
            schema.write_column(file, name, data)


@contextmanager
def _open_part(path: Path) -> Iterator[tuple[h5py.File, int]]:
    try:
        with schema.open_file(path, "trace-part") as file:
            yield file, int(file.attrs["rank"])
    except (ValueError, IndexError, TypeError) as error:
        raise DataError(f"{path}: damaged part of a trace: {error}") from error


def _about(path: Path) -> dict[str, Any]:
    with _open_part(path) as (file, rank):
        return {**json.loads(schema.read_text(file, "about")), "rank": rank}


def _rank_of(path: Path) -> int:
    return int(path.name.split("-")[1])


# ---------------------------------------------------------------- merging


def merge_trace(
    path: Path,
    job_json: str,
    sources: Mapping[str, str],
    clocks: Clocks,
    ranks: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    parts: Sequence[int] | None = None,
) -> None:
    """Merge all ranks' parts into the trace, a part at a time, and remove them; rank 0, once all ranks have written.

    Args:
        ranks: what is known of each rank, in order: {"node": ..., any number or text}.
        meta: `Recorder.describe`, `mode`, and what else was measured, which is stored as JSON text in /run.
        parts: how many parts each rank wrote, where known: fewer on the disk are an error.

    Raises:
        DataError: a part is missing or damaged, or the trace cannot be written.
    """
    found = committed_parts(path, PATTERN)
    _check_all_there(path, found, parts)
    with schema.create(path, "trace", sources=sources, job=job_json) as file:
        fill(file, found, clocks, ranks, meta)
    remove_parts(path)


def _check_all_there(path: Path, found: list[Path], expected: Sequence[int] | None) -> None:
    if expected is None:
        return
    have, wanted = Counter(map(_rank_of, found)), dict(enumerate(expected))
    for rank in sorted({*have, *wanted}):
        if have[rank] != wanted.get(rank, 0):
            raise DataError(f"{parts_folder(path)}: {have[rank]} parts of rank {rank}, expected {wanted.get(rank, 0)}")


def fill(
    file: h5py.File, parts: list[Path], clocks: Clocks, ranks: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]
) -> None:
    """Write a whole trace into an open file from the parts of all ranks, one part in memory at a time."""
    for name in SHAPE:
        file.attrs[name] = int(meta[name])
    for name in ("level", "mode"):
        schema.set_text_attribute(file, name, str(meta.get(name, "")))
    rest = {key: value for key, value in meta.items() if key not in (*SHAPE, "level", "mode")}
    schema.write_text(file, "run", json.dumps(rest, indent=2))
    _write_ranks(file.create_group("ranks"), ranks, int(meta["n_ranks"]))
    _write_clocks(file.create_group("clocks"), clocks)
    columns = {group: _columns(file, group, int(meta["top_k"])) for group in groups_of(str(meta["level"]))}
    load = _Load(meta)
    for rank, of_rank in groupby(parts, _rank_of):
        counters = _Counters(rank, meta)
        for path in of_rank:
            with _open_part(path) as (part, _):
                _append_rows(columns, part, rank, clocks)
                counters.add(part)
                load.add(rank, part["load"][...])
        counters.append_to(columns)
    load.write(file)


def _columns(file: h5py.File, group: str, top_k: int) -> dict[str, Column]:
    made = {}
    for name, (dtype, units, text) in COLUMNS[group].items():
        width = top_k if name in _WIDE else 0
        made[name] = Column(file.require_group(group), name, dtype, width=width, units=units, text=text)
        if name in _LEGENDS:
            schema.set_text_attribute(made[name].dataset, "legend", ",".join(_LEGENDS[name]))
    return made


def _append_rows(columns: dict[str, dict[str, Column]], part: h5py.File, rank: int, clocks: Clocks) -> None:
    shift = clocks.start + int(clocks.offset[rank])
    for group in {"spans", "routes"} & columns.keys() & part.keys():
        for name, column in columns[group].items():
            if name == "rank":
                data = np.full(len(part[group]["layer"]), rank, dtype=np.int32)
            else:
                data = part[group][name][...]
            column.append(data - shift if name in ("begin", "end") else data)


class _Counters:
    """Sums and traffic of one rank over all its parts."""

    def __init__(self, rank: int, meta: Mapping[str, Any]) -> None:
        self._rank = rank
        self._sums = np.zeros((2, len(STAGES), int(meta["n_layers"]) + 1), dtype=np.int64)  # [count and time, S, L + 1]
        self._traffic = np.zeros((3, len(KINDS), int(meta["n_layers"]), int(meta["n_ranks"])), dtype=np.int64)

    def add(self, part: h5py.File) -> None:
        sums, traffic = part["sums"], part["traffic"]
        where = (sums["stage"][...], sums["layer"][...] + 1)
        for place, name in enumerate(("count", "time")):
            np.add.at(self._sums[place], where, sums[name][...])
        link = (traffic["kind"][...], traffic["layer"][...], traffic["destination"][...])
        for place, name in enumerate(("rows", "bytes", "messages")):
            np.add.at(self._traffic[place], link, traffic[name][...])

    def append_to(self, columns: dict[str, dict[str, Column]]) -> None:
        stage, layer = np.nonzero(self._sums[0])
        kind, link_layer, destination = np.nonzero(self._traffic.any(axis=0))
        found = {
            "sums": {"stage": stage, "layer": layer - 1, "rank": np.full(len(stage), self._rank)},
            "traffic": {
                "kind": kind,
                "layer": link_layer,
                "source": np.full(len(kind), self._rank),
                "destination": destination,
            },
        }
        found["sums"] |= dict(zip(("count", "time"), self._sums[:, stage, layer], strict=True))
        totals = self._traffic[:, kind, link_layer, destination]
        found["traffic"] |= dict(zip(("rows", "bytes", "messages"), totals, strict=True))
        for group, arrays in found.items():
            for name, data in arrays.items():
                columns[group][name].append(data)


class _Load:
    """Tokens per layer and expert, in all and by the rank whose gate chose them."""

    def __init__(self, meta: Mapping[str, Any]) -> None:
        shape = tuple(int(meta[name]) for name in ("n_ranks", "n_layers", "n_experts"))
        self._total = np.zeros(shape[1:], dtype=np.int64)
        self._by_rank = np.zeros(shape, dtype=np.int64) if np.prod(shape) <= _LARGEST_LOAD_BY_RANK else None

    def add(self, rank: int, load: np.ndarray) -> None:
        self._total += load
        if self._by_rank is not None:
            self._by_rank[rank] += load

    def write(self, file: h5py.File) -> None:
        text = "tokens per layer and expert; a token counts once for each of its experts"
        schema.write_column(file, "load", self._total, text=text)
        if self._by_rank is not None:
            schema.write_column(file, "load_by_rank", self._by_rank, text=f"{text}; by the rank of the gate")


def _write_ranks(group: h5py.Group, ranks: Sequence[Mapping[str, Any]], n_ranks: int) -> None:
    schema.write_column(group, "rank", np.arange(n_ranks, dtype=np.int32), text="rank")
    for name in sorted({key for one in ranks for key in one} - {"rank"}):
        values = [one.get(name) for one in ranks]
        if all(isinstance(value, int | float) for value in values):
            schema.write_column(group, name, np.array(values, dtype=None))
        else:
            schema.write_ragged_text(group, name, ["" if value is None else str(value) for value in values])


def _write_clocks(group: h5py.Group, clocks: Clocks) -> None:
    schema.write_column(group, "rank", np.arange(len(clocks.offset), dtype=np.int32), text="rank")
    text = "clock of the rank minus clock of rank 0; begin and end are corrected by it"
    schema.write_column(group, "offset", clocks.offset.astype(np.int64), units="ns", text=text)
    text = "bound of the offset's error; -1: not known"
    schema.write_column(group, "error", clocks.error.astype(np.int64), units="ns", text=text)


# ---------------------------------------------------------------- parts that were never merged


def fill_from_parts(file: h5py.File, path: Path) -> None:
    """Write the trace of a run that did not end into an open file, from what its parts say of themselves.

    Raises:
        DataError: there are no parts, or they are damaged.
    """
    parts = committed_parts(path, PATTERN)
    if not parts:
        raise DataError(f"{path}: there is no such file, and no parts of an unfinished trace beside it")
    first_of_rank = [next(of_rank) for _, of_rank in groupby(parts, _rank_of)]
    abouts = {one["rank"]: one for one in map(_about, first_of_rank)}
    meta = next(iter(abouts.values()))
    n_ranks = int(meta["n_ranks"])
    clocks = Clocks(int(meta.get("start", 0)), np.zeros(n_ranks, np.int64), np.full(n_ranks, -1, dtype=np.int64))
    for rank, one in abouts.items():
        clocks.offset[rank], clocks.error[rank] = one.get("offset", 0), one.get("error", -1)
    schema.write_text(file, "job", str(meta.get("job", "")))
    known = {key: meta[key] for key in (*SHAPE, "level", "mode") if key in meta}
    fill(file, parts, clocks, [], known)


def set_aside(path: Path) -> Path | None:
    """Keep the trace of an earlier attempt before a resumed run begins its own: as `<name>.1.h5`, `.2.h5`, ...

    Returns:
        The name it now has, or None where there was no trace.
    """
    kept = next(one for one in _kept_names(path) if not one.exists())
    if path.exists():
        path.rename(kept)
        remove_parts(path)
    elif committed_parts(path, PATTERN):
        with schema.create(kept, "trace") as file:
            fill_from_parts(file, path)
        remove_parts(path)
    return kept if kept.exists() else None


def remove_kept(path: Path) -> None:
    """Remove the traces of earlier attempts that `set_aside` has kept."""
    for kept in _kept_names(path):
        if not kept.exists():
            return
        kept.unlink()


def _kept_names(path: Path) -> Iterator[Path]:
    return (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
