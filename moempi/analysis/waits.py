"""Who waited for whom?"""

from __future__ import annotations

import numpy as np

from moempi.analysis.trace import Trace


def waits_matrix(trace: Trace, column: str = "wait_time") -> np.ndarray:
    """Totals by (rank that waited, rank that it waited for), int64 [N, N]; times in ns.

    Args:
        column: "answers" and "answer_time" count every answer, from posting its dispatch; "waits" and "wait_time"
            only the last one of each dispatch of a microbatch, which may be the rank's own expert; "exposed_time"
            is time with nothing to do while the oldest unanswered dispatch was with that rank.
    """
    waits = trace.waits
    matrix = np.zeros((trace.n_ranks, trace.n_ranks), dtype=np.int64)
    matrix[waits["rank"], waits["peer"]] = waits[column]
    return matrix
