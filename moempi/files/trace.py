"""The trace file: what every rank noted down, written as parts while the job runs and merged by rank 0 at its end.

    /spans/{rank,phase,stage,layer,microbatch,step,peer,begin,end,tokens,bytes}     from level full
    /routes/{rank,microbatch,step,layer,sequence,position,experts,weights}     level routes
    /wall/{rank,begin,end,time}     /sums/{rank,phase,stage,layer,count,time,tokens}
    /traffic and /received/{kind,layer,source,destination,rows,bytes,messages}
    /sizes/{rank,kind,size_class,messages}
    /waits/{rank,peer,answers,answer_time,waits,wait_time,exposed_time}
    /load [L, E]     /load_by_rank [N, L, E], where that is not huge
    /clocks/{rank,offset,drift,error}     /ranks/{rank,...}
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

from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.files.parts import (
    Column,
    committed_parts,
    make_folder,
    parts_folder,
    remove_parts,
    remove_temporaries,
)
from moempi.files.trace_checks import check_about
from moempi.files.trace_columns import COLUMNS, LEGENDS, SHAPE, WIDE, groups_of
from moempi.files.trace_counters import Counters, Load, Wall

PATTERN = "rank-*.h5"


@dataclass(frozen=True)
class Clocks:
    """How the ranks' clocks (time.perf_counter_ns) relate to rank 0's, in ns.

    Between two measurements a clock is taken to gain evenly, so that the larger of their errors bounds the error.
    """

    start: int  # the job's start on rank 0's clock
    offset: np.ndarray  # int64 [N], rank's clock - rank 0's
    error: np.ndarray  # int64 [N], bound of the offset's error; -1: not known
    at: np.ndarray  # int64 [N], when the offset was measured, on the rank's clock
    drift: np.ndarray  # float64 [N], what the offset gains in a ns of the rank's clock; 0 where measured only once

    def since_start(self, rank: int, times: np.ndarray) -> np.ndarray:
        """Times of a rank's clock as times since the job's start on rank 0's; int64, in and out."""
        gained = np.rint(self.drift[rank] * (times - self.at[rank])).astype(np.int64)
        return times - gained - (self.start + int(self.offset[rank]))


def between(start: int, begin: np.ndarray, end: np.ndarray) -> Clocks:
    """Clocks that were measured twice: int64 [N, 3] each, offset, error and the rank's own time."""
    passed = np.maximum(end[:, 2] - begin[:, 2], 1)
    drift = (end[:, 0] - begin[:, 0]) / passed
    return Clocks(start, begin[:, 0], np.maximum(begin[:, 1], end[:, 1]), begin[:, 2], drift)


# ---------------------------------------------------------------- part files


def write_part(path: Path, rank: int, number: int, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Write what a recorder gave as `<trace>.parts/rank-<rank>-<number>.h5`; complete or not there, after any crash.

    Args:
        path: the trace that the part belongs to.
        number: counts this rank's parts, from 1.
        arrays: from `Recorder.take`.
        about: `Recorder.describe`, and what is known when the job starts: `mode`, `cut_layers`, `job` (JSON text),
            `start`, `offset` and `error` of this rank's clock (ns). It makes the parts readable when the job never gets
            to merge them.

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
            yield file, schema.whole_attribute(file, "rank")
    except (ValueError, IndexError, TypeError) as error:
        raise DataError(f"{path}: damaged part of a trace: {error}") from error


def _about(path: Path) -> dict[str, Any]:
    with _open_part(path) as (file, rank):
        about = {**schema.parse_json(schema.read_text(file, "about")), "rank": rank}
    check_about(about, path)
    return about


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
    load = Load(meta)
    for rank, of_rank in groupby(parts, _rank_of):
        counters, wall = Counters(rank, meta), Wall()
        for path in of_rank:
            with _open_part(path) as (part, _):
                _append_rows(columns, part, rank, clocks)
                counters.add(part)
                wall.add(part)
                load.add(rank, part["load"][...])
        for group, rows in {**counters.columns(), "wall": _wall_rows(rank, wall, clocks)}.items():
            for name, data in rows.items():
                columns[group][name].append(data)
    load.write(file)


def _wall_rows(rank: int, wall: Wall, clocks: Clocks) -> dict[str, np.ndarray]:
    begin, end, time = wall.times().T
    shifted = {"begin": clocks.since_start(rank, begin), "end": clocks.since_start(rank, end)}
    return {"rank": np.full(len(time), rank), **shifted, "time": time}


def _columns(file: h5py.File, group: str, top_k: int) -> dict[str, Column]:
    made = {}
    for name, (dtype, units, text) in COLUMNS[group].items():
        width = top_k if name in WIDE else 0
        made[name] = Column(file.require_group(group), name, dtype, width=width, units=units, text=text)
        if name in LEGENDS:
            schema.set_text_attribute(made[name].dataset, "legend", ",".join(LEGENDS[name]))
    return made


def _append_rows(columns: dict[str, dict[str, Column]], part: h5py.File, rank: int, clocks: Clocks) -> None:
    for group in {"spans", "routes"} & columns.keys() & part.keys():
        for name, column in columns[group].items():
            if name == "rank":
                data = np.full(len(part[group]["layer"]), rank, dtype=np.int32)
            else:
                data = part[group][name][...]
            column.append(clocks.since_start(rank, data) if name in ("begin", "end") else data)


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
    text = "clock of the rank minus clock of rank 0 at the job's start; begin and end are corrected by it"
    schema.write_column(group, "offset", clocks.offset.astype(np.int64), units="ns", text=text)
    text = "what the offset gained in a ns, where it was measured again at the end; begin and end are corrected by it"
    schema.write_column(group, "drift", clocks.drift.astype(np.float64), text=text)
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
    offset, unknown = np.zeros(n_ranks, np.int64), np.full(n_ranks, -1, dtype=np.int64)
    clocks = Clocks(int(meta.get("start", 0)), offset, unknown, np.zeros_like(offset), np.zeros(n_ranks))
    for rank, one in abouts.items():
        clocks.offset[rank], clocks.error[rank] = one.get("offset", 0), one.get("error", -1)
    schema.write_text(file, "job", str(meta.get("job", "")))
    known = {key: meta[key] for key in (*SHAPE, "level", "mode", "cut_layers") if key in meta}
    fill(file, parts, clocks, [], known)


def refuse_existing(path: Path) -> None:
    """Refuse to write a trace where there is one, whole or in parts.

    Raises:
        JobError: there is one.
    """
    parts = committed_parts(path, PATTERN)
    if path.exists() or parts:
        what = "exists already" if path.exists() else f"an earlier run left it unfinished, in {parts_folder(path).name}"
        raise JobError(
            f"{path}: {what}; give --overwrite to replace output and trace, move the trace away, or give another "
            "`trace.file`"
        )


def make_way(path: Path, level: str, *, resume: bool, overwrite: bool) -> None:
    """Before a run begins its trace: keep the one of the run that is gone on with, under another name, or remove all.

    At level "off" nothing is written, and what is there stays. With neither, an output is not begun where a trace is.
    """
    if level == "off":
        return
    if resume:
        set_aside(path)
    elif overwrite:
        path.unlink(missing_ok=True)
        remove_parts(path)
        _remove_kept(path)


def set_aside(path: Path) -> Path | None:
    """Keep the trace of an earlier attempt before a resumed run begins its own: as `<name>.1.h5`, `.2.h5`, ...

    Returns:
        The name it now has, or None where there was no trace.
    """
    kept = next(one for one in _kept_names(path) if not one.exists())
    remove_temporaries(kept)
    if path.exists():
        path.rename(kept)
        remove_parts(path)
    else:
        _merge_left(path, kept)
    return kept if kept.exists() else None


def complete(path: Path) -> None:
    """Merge the parts of a run that was killed between writing its output and its trace; nothing where there are none.

    Raises:
        DataError: they are damaged, or the trace cannot be written.
    """
    if path.exists():
        remove_parts(path)
    else:
        _merge_left(path, path)


def _merge_left(path: Path, to: Path) -> None:
    if committed_parts(path, PATTERN):
        with schema.create(to, "trace") as file:
            fill_from_parts(file, path)
        remove_parts(path)


def _remove_kept(path: Path) -> None:
    for kept in _kept_names(path):
        remove_temporaries(kept)
        if not kept.exists():
            return
        kept.unlink()


def _kept_names(path: Path) -> Iterator[Path]:
    return (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
