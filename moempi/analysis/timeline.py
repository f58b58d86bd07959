"""What did every rank do, and when?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moempi.analysis.trace import Trace
from moempi.errors import DataError
from moempi.stages import STAGES

# Stages that a rank works in, by what the work is for; of those that a trace has, no two of one rank overlap.
WORK = {
    "attention": ("project", "attend"),
    "expert": ("expert",),
    "gate": ("gate",),
    "dispatch, combine": ("pack", "dispatch", "answer", "receive", "combine"),
    "dense, head": ("compose", "embed", "dense", "head"),
    "idle": ("exposed", "barrier", "idle"),
}
WAIT = "wait for answers"
SPANS_SHOWN = 1500  # about as many as can be told apart in a picture


@dataclass(frozen=True)
class Window:
    """A part of a job's time, in ns since its start."""

    begin: int
    end: int


def busy_window(trace: Trace, begin: float | None = None, length: float | None = None) -> Window:
    """A window of the time in which the trace has spans.

    Args:
        begin: in s since the job's start; by default so that the window lies in the middle.
        length: in s; by default so short that it has about `SPANS_SHOWN` spans.

    Raises:
        DataError: no spans, at all or in this window.
    """
    spans = trace.spans
    if not len(spans["begin"]):
        raise DataError(f"{trace.path}: there are no spans in it")
    first, last = int(spans["begin"].min()), int(spans["end"].max())
    share = min(1.0, SPANS_SHOWN / len(spans["begin"]))
    ns = round(1e9 * length) if length is not None else max(1, round((last - first) * share))
    start = round(1e9 * begin) if begin is not None else max(first, (first + last - ns) // 2)
    if start >= last or start + ns <= first:
        raise DataError(
            f"{trace.path}: no spans from {start / 1e9:.3f} to {(start + ns) / 1e9:.3f} s; "
            f"it has some from {first / 1e9:.3f} to {last / 1e9:.3f} s"
        )
    return Window(start, start + ns)


def spans_in(trace: Trace, window: Window) -> dict[str, np.ndarray]:
    """Spans that reach into a window, by the keys of `WORK` and `WAIT`: int64 [n, 3] of (rank, begin, end) in ns.

    Begin and end are cut to the window. Stages that contain others (`step`) are left out.
    """
    spans = trace.spans
    inside = (spans["begin"] < window.end) & (spans["end"] > window.begin)
    stage = spans["stage"][inside]
    columns = [
        spans["rank"][inside].astype(np.int64),
        spans["begin"][inside].clip(window.begin, window.end),
        spans["end"][inside].clip(window.begin, window.end),
    ]
    table = np.stack(columns, axis=1)
    kinds = {**WORK, WAIT: ("wait",)}
    return {kind: table[np.isin(stage, [STAGES.index(one) for one in names])] for kind, names in kinds.items()}
