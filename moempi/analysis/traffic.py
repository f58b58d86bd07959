"""What went from which rank to which?"""

from __future__ import annotations

import numpy as np

from moempi.analysis.trace import Columns, Trace
from moempi.recorder import SIZE_CLASSES
from moempi.stages import KINDS


def traffic_matrix(trace: Trace, kind: str, column: str = "bytes", layer: int | None = None) -> np.ndarray:
    """Totals by (source, destination), int64 [N, N]. The diagonal is what stayed on its rank, without a message.

    Args:
        kind: one of KINDS; with relays a row counts once for each hop.
        column: "rows", "bytes" or "messages".
        layer: only this one; None: all.
    """
    return _matrix(trace.traffic, trace.n_ranks, kind, column, layer)


def received_matrix(trace: Trace, kind: str, column: str = "bytes", layer: int | None = None) -> np.ndarray:
    """The same as the receiving ranks counted it, without what stayed on its rank."""
    return _matrix(trace.received, trace.n_ranks, kind, column, layer)


def _matrix(traffic: Columns, n_ranks: int, kind: str, column: str, layer: int | None) -> np.ndarray:
    chosen = traffic["kind"] == KINDS.index(kind)
    if layer is not None:
        chosen &= traffic["layer"] == layer
    link = traffic["source"][chosen].astype(np.int64) * n_ranks + traffic["destination"][chosen]
    matrix = np.zeros(n_ranks**2, dtype=np.int64)
    np.add.at(matrix, link, traffic[column][chosen])
    return matrix.reshape(n_ranks, n_ranks)


def node_matrix(trace: Trace, kind: str, column: str = "bytes") -> np.ndarray | None:
    """Totals by (node of the source, node of the destination), int64 [nodes, nodes]; None if nodes are not known."""
    if not all("node" in one for one in trace.ranks):
        return None
    nodes = np.array([one["node"] for one in trace.ranks])
    member = np.equal.outer(np.unique(nodes), nodes).astype(np.int64)  # [nodes, N]
    return member @ traffic_matrix(trace, kind, column) @ member.T


def message_sizes(trace: Trace, kind: str) -> np.ndarray:
    """Mean bytes of a message by (source, destination), float64 [N, N]; nan where there was none."""
    messages = traffic_matrix(trace, kind, "messages").astype(np.float64)
    sizes = traffic_matrix(trace, kind, "bytes") * (messages > 0)
    return sizes / np.where(messages > 0, messages, np.nan)


def size_histogram(trace: Trace, kind: str) -> np.ndarray:
    """Messages of all ranks by size class, int64 [64]: class c holds 2^(c - 1) to 2^c - 1 bytes."""
    chosen = trace.sizes["kind"] == KINDS.index(kind)
    return np.bincount(
        trace.sizes["size_class"][chosen], weights=trace.sizes["messages"][chosen], minlength=SIZE_CLASSES
    ).astype(np.int64)
