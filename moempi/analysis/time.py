"""Where did the time go?"""

from __future__ import annotations

import numpy as np

from moempi.analysis.trace import Trace
from moempi.stages import BARRIER, EXPERT, EXPOSED, FIRST_LEAF, IDLE, LOADED, PHASES, STAGES, STEP


def time_per_stage(trace: Trace, phase: int | None = None) -> np.ndarray:
    """Seconds per rank and stage, float64 [N, S]; the leaf stages, from FIRST_LEAF on, add up to `wall_time`.

    Args:
        phase: only what belongs to steps of this phase; None: all.
    """
    return _per_stage(trace, "time", phase) / 1e9


def spans_per_stage(trace: Trace, phase: int | None = None) -> np.ndarray:
    """Number of spans per rank and stage, int64 [N, S]."""
    return _per_stage(trace, "count", phase)


def tokens_per_stage(trace: Trace, phase: int | None = None) -> np.ndarray:
    """Tokens or rows per rank and stage, int64 [N, S]."""
    return _per_stage(trace, "tokens", phase)


def _per_stage(trace: Trace, column: str, phase: int | None) -> np.ndarray:
    sums = trace.sums
    chosen = sums["phase"] >= 0 if phase is None else sums["phase"] == phase
    found = np.zeros((trace.n_ranks, len(STAGES)), dtype=np.int64)
    np.add.at(found, (sums["rank"][chosen], sums["stage"][chosen]), sums[column][chosen])
    return found


def wall_time(trace: Trace) -> np.ndarray:
    """Seconds from each rank's first look at work to the end of its last lap, float64 [N]."""
    wall = np.zeros(trace.n_ranks)
    wall[trace.wall["rank"]] = trace.wall["time"] / 1e9
    return wall


def coverage(trace: Trace) -> np.ndarray:
    """Share of each rank's wall time that its leaf stages cover, float64 [N]; nan where it has none."""
    wall = np.zeros(trace.n_ranks, dtype=np.int64)
    wall[trace.wall["rank"]] = trace.wall["time"]
    return _per_stage(trace, "time", None)[:, FIRST_LEAF:].sum(axis=1) / np.where(wall > 0, wall, np.nan)


def idle_shares(trace: Trace) -> dict[str, np.ndarray]:
    """{stage: share of the wall time} of having nothing to do, float64 [N]: exposed, barrier and idle.

    exposed: dispatches were unanswered, own ones or those that the rank relays, so this is communication, and experts
    elsewhere, that no work here hid.
    """
    return {STAGES[stage]: _share(trace, stage) for stage in (EXPOSED, BARRIER, IDLE)}


def expert_utilisation(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Share of the wall time in which a rank's experts computed, and in which they could have; float64 [N] each.

    They could have while rows were there: from the arrival of the first until none was left.
    """
    return _share(trace, EXPERT), _share(trace, LOADED)


def _share(trace: Trace, stage: int) -> np.ndarray:
    wall = wall_time(trace)
    return time_per_stage(trace)[:, stage] / np.where(wall > 0, wall, np.nan)


def steps_per_phase(trace: Trace) -> dict[str, tuple[int, int, float]]:
    """{phase: (steps, tokens in them, seconds from their begin to their end)} over all ranks."""
    found = {}
    for phase in range(1, len(PHASES)):
        tables = (spans_per_stage(trace, phase), tokens_per_stage(trace, phase), time_per_stage(trace, phase))
        steps, tokens, seconds = (table[:, STEP].sum() for table in tables)
        found[PHASES[phase]] = (int(steps), int(tokens), float(seconds))
    return found


def clock_error(trace: Trace) -> int | None:
    """Largest error bound of a rank's clock against rank 0's, in ns; None where some rank's is not known."""
    error = trace.clocks["error"]
    return None if len(error) == 0 or error.min() < 0 else int(error.max())
