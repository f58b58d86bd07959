"""Where did the time go?"""

from __future__ import annotations

import numpy as np

from moempi.analysis.trace import Trace
from moempi.recorder import STAGES


def time_per_stage(trace: Trace) -> np.ndarray:
    """Seconds per rank and stage, float64 [N, S]; stages may lie inside others, so they need not add up."""
    return _per_stage(trace, "time") / 1e9


def spans_per_stage(trace: Trace) -> np.ndarray:
    """Number of spans per rank and stage, int64 [N, S]."""
    return _per_stage(trace, "count")


def _per_stage(trace: Trace, column: str) -> np.ndarray:
    found = np.zeros((trace.n_ranks, len(STAGES)), dtype=np.int64)
    np.add.at(found, (trace.sums["rank"], trace.sums["stage"]), trace.sums[column])
    return found


def clock_error(trace: Trace) -> int | None:
    """Largest error bound of a rank's clock against rank 0's, in ns; None where some rank's is not known."""
    error = trace.clocks["error"]
    return None if len(error) == 0 or error.min() < 0 else int(error.max())
