"""What went from which rank to which?"""

from __future__ import annotations

import numpy as np

from moempi.analysis.trace import Trace
from moempi.recorder import KINDS


def traffic_matrix(trace: Trace, kind: str, column: str = "bytes", layer: int | None = None) -> np.ndarray:
    """Totals by (source, destination), int64 [N, N]. The diagonal is what stayed on its rank, without a message.

    Args:
        kind: "dispatch" or "answer".
        column: "rows", "bytes" or "messages".
        layer: only this one; None: all.
    """
    traffic = trace.traffic
    chosen = traffic["kind"] == KINDS.index(kind)
    if layer is not None:
        chosen &= traffic["layer"] == layer
    link = traffic["source"][chosen].astype(np.int64) * trace.n_ranks + traffic["destination"][chosen]
    matrix = np.zeros(trace.n_ranks**2, dtype=np.int64)
    np.add.at(matrix, link, traffic[column][chosen])
    return matrix.reshape(trace.n_ranks, trace.n_ranks)


def message_sizes(trace: Trace, kind: str) -> np.ndarray:
    """Mean bytes of a message by (source, destination), float64 [N, N]; nan where there was none."""
    messages = traffic_matrix(trace, kind, "messages").astype(np.float64)
    return traffic_matrix(trace, kind, "bytes") / np.where(messages > 0, messages, np.nan)
