"""The placement file (format moempi-placement 1): the table of slots, one HDF5 column per column of the table.

    /            attributes n_ranks, n_experts, leaves
    /layers      int32 [L], the MoE layers, ascending
    /slots/      layer, expert, replica, lo, hi, rank: int32 [S]

Rows may stand in any order in the file; the table that is read is sorted and keeps every rule of a placement.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from moempi.errors import DataError, JobError
from moempi.files import schema
from moempi.job import PlacementOptions
from moempi.model.config import ModelConfig
from moempi.planning.placement import COLUMNS, Placement, check_placement

# (units, what the column holds)
_TEXTS = {
    "layer": ("", "MoE layer of the slot"),
    "expert": ("", "expert of the slot"),
    "replica": ("", "replica of the expert that the slot belongs to, counted from 0"),
    "lo": ("leaves", "begin of the slot's hidden range"),
    "hi": ("leaves", "end of the slot's hidden range (not included)"),
    "rank": ("", "rank that holds the slot"),
}
# A damaged length must not make the reader allocate without bound: 58 layers, 16 slots each, on 18,000 ranks.
_MOST_SLOTS = 2**24
_INT32_MAX = 2**31 - 1


def write_placement(
    path: Path, placement: Placement, sources: Mapping[str, str] | None = None, options: PlacementOptions | None = None
) -> None:
    """Write a placement that keeps the rules; an existing file is replaced as a whole.

    Args:
        sources: {name: SHA-256 in hex} of what the placement was made from (topology, measured load).
        options: those that it was placed by, stored as the `placement` section of `/job`.

    Raises:
        DataError: the placement breaks a rule; nothing is written.
    """
    check_placement(placement)
    job = "" if options is None else json.dumps({"placement": options.model_dump(mode="json")}, indent=2)
    with schema.create(path, "placement", sources=sources, job=job) as file:
        for name in ("n_ranks", "n_experts", "leaves"):
            file.attrs[name] = np.int64(getattr(placement, name))
        schema.write_column(file, "layers", np.array(placement.layers, dtype=np.int32), text="the MoE layers")
        group = file.create_group("slots")
        for name, column in placement.slots().items():
            units, text = _TEXTS[name]
            schema.write_column(group, name, column, units=units, text=text)


def read_placement(path: Path) -> Placement:
    """Read a placement file and check every rule of the table.

    Raises:
        DataError: naming the file and the dataset, attribute, or layer and expert that is wrong.
    """
    with schema.open_file(path, "placement") as file:
        counts = [_count(file, name, path) for name in ("n_ranks", "n_experts", "leaves")]
        layers = _column(file, "layers", path)
        columns = {name: _column(file, f"slots/{name}", path) for name in COLUMNS}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{path}: columns of /slots have the lengths {lengths}; expected one length for all")
    placement = Placement.from_slots(counts[0], counts[1], counts[2], tuple(layers.tolist()), columns)
    try:
        check_placement(placement)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return placement


def _count(file: h5py.File, name: str, path: Path) -> int:
    value = file.attrs.get(name)
    if not isinstance(value, np.integer) or not 1 <= value <= _INT32_MAX:
        raise DataError(f"{path}: attribute {name} is {value!r}; expected a whole number of at least 1")
    return int(value)


def _column(file: h5py.File, name: str, path: Path) -> np.ndarray:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{path}: there is no dataset /{name}")
    if dataset.dtype.kind not in "iu" or dataset.ndim != 1 or dataset.size > _MOST_SLOTS:
        raise DataError(
            f"{path}: /{name} is {dataset.dtype} of shape {dataset.shape}; "
            f"expected whole numbers of shape [S], at most {_MOST_SLOTS}"
        )
    values = dataset[...]
    if values.size and not -_INT32_MAX <= int(values.min()) <= int(values.max()) <= _INT32_MAX:
        raise DataError(f"{path}: /{name} holds {values.min()} to {values.max()}; expected 32-bit numbers")
    return np.asarray(values, dtype=np.int32)


def fits(placement: Placement, config: ModelConfig, n_ranks: int, leaves: int, path: Path) -> None:
    """Check a placement that was read from `path` against the model and the job.

    Raises:
        JobError: it was made for another number of ranks or another `model.leaves`.
        DataError: it was made for a model with other experts or other MoE layers.
    """
    if placement.n_ranks != n_ranks:
        raise JobError(
            f"{path}: made for {placement.n_ranks} ranks, but the job runs on {n_ranks}; "
            f"start it on {placement.n_ranks} ranks or make another placement"
        )
    if placement.leaves != leaves:
        raise JobError(
            f"{path}: its slots are ranges of {placement.leaves} leaves, but model.leaves = {leaves}; "
            f"set model.leaves = {placement.leaves} or make another placement"
        )
    if placement.n_experts != config.n_experts:
        raise DataError(f"{path}: made for {placement.n_experts} experts per layer; the model has {config.n_experts}")
    if placement.layers != config.moe_layers:
        raise DataError(
            f"{path}: places {_show(placement.layers)}; the model has experts in {_show(config.moe_layers)}"
        )


def _show(layers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, layers[:8]))
    return f"{len(layers)} layers ({shown}{', …' if len(layers) > 8 else ''})"
