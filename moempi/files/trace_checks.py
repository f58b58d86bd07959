"""What a trace may say of itself and hold, checked before anything is made as large or looked up by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files.trace_columns import COLUMNS, OWNER, SHAPE, WIDE, ends_of, groups_of, values_of
from moempi.recorder import LEVELS

# Parts say how many ranks the run had, and nothing else in them is as long.
MOST_RANKS = 2**20
MOST_LOAD = 2**24  # layers times experts

REQUIRED = {"ranks": ("rank",), "clocks": ("rank", "offset", "drift", "error")}  # columns


def checked_shape(found: Mapping[str, Any], where: Path) -> tuple[int, ...]:
    """The numbers of SHAPE.

    Raises:
        DataError: one is missing, no whole number, or beyond what any run has.
    """
    for name in SHAPE:
        value = found.get(name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= MOST_RANKS:
            raise DataError(f"{where}: {name} is {value!r}; expected a whole number up to {MOST_RANKS}")
    shape = tuple(int(found[name]) for name in SHAPE)
    if not shape[0] or math.prod(shape[1:3]) > MOST_LOAD:
        raise DataError(f"{where}: {dict(zip(SHAPE, shape, strict=True))}; no trace is of that shape")
    return shape


def check_about(about: Mapping[str, Any], where: Path) -> None:
    """Check what a part says of its run: shape, rank, level and the numbers of its clock.

    Raises:
        DataError: naming what is wrong.
    """
    n_ranks = checked_shape(about, where)[0]
    if not 0 <= about["rank"] < n_ranks:
        raise DataError(f"{where}: is of rank {about['rank']}; the run had {n_ranks}")
    if about.get("level") not in LEVELS:
        raise DataError(f"{where}: level is {about.get('level')!r}; expected one of {', '.join(LEVELS)}")
    for name in ("start", "offset", "error"):
        value = about.get(name, 0)
        if not isinstance(value, int) or abs(value) >= 2**62:
            raise DataError(f"{where}: {name} is {value!r}; expected ns")


def check_tables(file: h5py.File, path: Path, level: str, shape: tuple[int, ...]) -> None:
    """Check that the tables of a trace are there and of the lengths that `shape` asks for; reads none of them.

    Raises:
        DataError: naming the dataset.
    """
    n_ranks, n_layers, n_experts, top_k = shape
    expected: dict[str, tuple[int, ...]] = {"load": (n_layers, n_experts)}
    if "load_by_rank" in file:
        expected["load_by_rank"] = (n_ranks, n_layers, n_experts)
    expected |= {f"{group}/{name}": (n_ranks,) for group in ("ranks", "clocks") for name in _numbers(file, group)}
    for group in groups_of(level):
        rows = len(_dataset(file, f"{group}/{next(iter(COLUMNS[group]))}", path))
        for name in COLUMNS[group]:
            expected[f"{group}/{name}"] = (rows, top_k) if name in WIDE else (rows,)
    for name, wanted in expected.items():
        found = _dataset(file, name, path)
        if found.shape != wanted or found.dtype.kind not in "iuf":
            raise DataError(f"{path}: /{name} is {found.dtype} {list(found.shape)}; expected numbers {list(wanted)}")


def _numbers(file: h5py.File, group: str) -> list[str]:
    """Names of the columns that are not text, and of those that must be there."""
    names = [*file[group]] if group in file else []
    offsets = {name for name in names if name.endswith("_offsets")}
    text = {name.removesuffix("_offsets") for name in offsets}
    return [*REQUIRED[group], *(name for name in names if name not in text | offsets)]


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    found = file.get(name)
    if not isinstance(found, h5py.Dataset) or not found.ndim:
        raise DataError(f"{path}: /{name} is missing")
    return found


def check_column(group: str, name: str, data: np.ndarray, shape: tuple[int, ...], path: Path) -> None:
    """Refuse places outside `shape`, and counts below zero.

    Raises:
        DataError: naming the column.
    """
    dtype = COLUMNS[group][name][0] if name in COLUMNS.get(group, {}) else ""
    if dtype and data.dtype.kind != np.dtype(dtype).kind:
        raise DataError(f"{path}: /{group}/{name} is {data.dtype}; expected {np.dtype(dtype)}")
    ends = {"rank": shape[0], "experts": shape[2]} | ends_of(shape[0], shape[1])
    low = -1 if name in ("layer", "peer") else 0
    if not data.size or not (name in ends or (group in OWNER and name in values_of(group))):
        return
    if data.min() < low or data.max() >= ends.get(name, math.inf):
        raise DataError(
            f"{path}: /{group}/{name} holds {data.min()} to {data.max()}; expected at least {low}"
            + (f" and less than {ends[name]}" if name in ends else "")
        )


def check_load(load: np.ndarray, path: Path) -> np.ndarray:
    """Counts of tokens, as they are.

    Raises:
        DataError: they are none.
    """
    if load.dtype.kind not in "iu" or (load.size and load.min() < 0):
        raise DataError(f"{path}: /load is {load.dtype} with values below 0, or no whole numbers; expected counts")
    return load
