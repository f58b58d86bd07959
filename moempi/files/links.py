"""The links file (format moempi-links 1): what messages take between the ranks of a launch.

    /size                         int64 [S], bytes of a message
    /source, /destination         int32 [P], the two ranks; every pair once, source < destination
    /time                         float64 [P, S], s, one way
    /latency, /bandwidth          float64 [P]; a message takes about latency + bytes / bandwidth
    /ranks/node, /ranks/host, /ranks/device      of every rank [N]
    /ranks/oversubscription       float64 [N]

Links are taken as alike in both directions: times are halves of round trips.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from moempi.errors import DataError
from moempi.files import schema

# name -> (kind of number, units, what it holds)
_COLUMNS = {
    "size": ("iu", "bytes", "size of a message"),
    "source": ("iu", "", "one rank of the pair"),
    "destination": ("iu", "", "the other rank of the pair"),
    "time": ("f", "s", "one message one way, by pair and size: half a round trip, the median of several"),
    "latency": ("f", "s", "shortest time of a message"),
    "bandwidth": ("f", "bytes/s", "largest message / (its time - latency)"),
}
_MOST = 2**28  # numbers in a dataset; a damaged length must not make the reader allocate without bound


@dataclass(frozen=True)
class MeasuredLinks:
    """Times of messages between the ranks of a launch.

    Args:
        size: bytes of a message, int64 [S], rising.
        source, destination: ranks, int32 [P]; each pair once.
        time: s, one way, float64 [P, S].
        latency: s, float64 [P].
        bandwidth: bytes/s, float64 [P].
        node: number of the node of every rank, int32 [N].
        host: its host name [N].
        device: whose memory it sent [N]: "cpu", or a GPU with its number on the host.
        oversubscription: seconds that a second of its computing takes while all ranks compute, float64 [N]; 1 where
            it has a core to itself.
    """

    size: np.ndarray
    source: np.ndarray
    destination: np.ndarray
    time: np.ndarray
    latency: np.ndarray
    bandwidth: np.ndarray
    node: np.ndarray
    host: list[str]
    device: list[str]
    oversubscription: np.ndarray

    @property
    def between(self) -> np.ndarray:
        """Whether a pair's ranks are on different nodes, bool [P]."""
        return np.asarray(self.node[self.source] != self.node[self.destination])


def write_links(path: Path, links: MeasuredLinks) -> None:
    """Write a links file; an existing one is replaced as a whole.

    Raises:
        DataError: it cannot be written.
    """
    with schema.create(path, "links") as file:
        for name, (_, units, text) in _COLUMNS.items():
            schema.write_column(file, name, getattr(links, name), units=units, text=text)
        ranks = file.create_group("ranks")
        schema.write_column(ranks, "node", links.node, text="ranks that share memory have the same number")
        schema.write_ragged_text(ranks, "host", links.host)
        schema.write_ragged_text(ranks, "device", links.device)
        text = "seconds that a second of computing takes while all ranks compute"
        schema.write_column(ranks, "oversubscription", links.oversubscription, text=text)


def read_links(path: Path) -> MeasuredLinks:
    """Read a links file.

    Raises:
        DataError: naming the file, and the dataset that is missing or wrong.
    """
    with schema.open_file(path, "links") as file:
        columns = {name: _column(file, name, kinds, path) for name, (kinds, _, _) in _COLUMNS.items()}
        node = _column(file, "ranks/node", "iu", path)
        host = schema.read_ragged_text(file["ranks"], "host")
        # The first of these files say neither of the two.
        device = schema.read_ragged_text(file["ranks"], "device") if "device" in file["ranks"] else ["cpu"] * len(node)
        crowd = "ranks/oversubscription"
        oversubscription = _column(file, crowd, "f", path) if crowd in file else np.ones(len(node))
    links = MeasuredLinks(**columns, node=node, host=host, device=device, oversubscription=oversubscription)
    _check(links, path)
    return links


def _column(file: h5py.File, name: str, kinds: str, path: Path) -> np.ndarray:
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{path}: there is no dataset /{name}")
    if dataset.dtype.kind not in kinds or dataset.ndim != (2 if name == "time" else 1) or dataset.size > _MOST:
        expected = "whole numbers" if kinds == "iu" else "floating-point numbers"
        raise DataError(f"{path}: /{name} is {dataset.dtype} of shape {dataset.shape}; expected {expected}")
    return np.asarray(dataset[...])


def _check(links: MeasuredLinks, path: Path) -> None:
    """Raise a DataError where the columns do not belong together or hold what no measurement gives."""
    pairs, n_ranks = len(links.source), len(links.node)
    shapes = {
        "size": (len(links.size),),
        "source": (pairs,),
        "destination": (pairs,),
        "time": (pairs, len(links.size)),
        "latency": (pairs,),
        "bandwidth": (pairs,),
    }
    for name, shape in shapes.items():
        found = getattr(links, name).shape
        if found != shape:
            raise DataError(f"{path}: /{name} has the shape {found}; expected {shape}")
    for name in ("source", "destination"):
        ranks = getattr(links, name)
        if pairs and not 0 <= int(ranks.min()) <= int(ranks.max()) < n_ranks:
            raise DataError(f"{path}: /{name} holds {ranks.min()} to {ranks.max()}; expected ranks below {n_ranks}")
    for name in ("time", "latency", "bandwidth"):
        values = getattr(links, name)
        if not (np.isfinite(values) & (values > 0)).all():
            raise DataError(f"{path}: /{name} holds numbers that are not above 0")
    if not (np.isfinite(links.oversubscription) & (links.oversubscription >= 1)).all():
        raise DataError(f"{path}: /ranks/oversubscription holds numbers that are below 1")
    for name in ("host", "device", "oversubscription"):
        if len(getattr(links, name)) != n_ranks:
            raise DataError(f"{path}: /ranks/{name} has {len(getattr(links, name))} entries; expected {n_ranks}")
