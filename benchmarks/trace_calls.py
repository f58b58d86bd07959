"""What the trace costs, from below: how often a job calls its recorder, times what a call takes at each level.

    python -m moempi.launch -n 2 -- python benchmarks/trace_calls.py JOB.toml

A benchmark of whole runs (trace_cost.py) sees a percent only where a machine is quieter than that; this one counts.
Left out are calls while a rank has nothing to do, what a larger working set costs a cache, writing parts, and merging
them after the run. Rank 0 prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moempi import mpi
from moempi.job import load_job
from moempi.recorder import LEVELS, Recorder
from moempi.stages import ANSWER_KIND, DISPATCH_KIND, EXPOSED, PROJECT, STEP

KEY = (0, 1, 1)  # microbatch, step, phase
REPEATS = 20_000
ROWS = 16  # of a microbatch, in the calls that are given its routes


def main() -> None:
    world = mpi.start()
    from moempi.run import run

    counts: Counter[str] = Counter()
    for name in CALLS:
        setattr(Recorder, name, counted(counts, name, getattr(Recorder, name)))
    job = load_job(Path(sys.argv[1]), ["trace.level=off"])
    outcome = run(world, job, overwrite=True)
    everywhere = world.gather(dict(counts), root=0)
    if world.rank == 0:
        print(json.dumps(report(everywhere, outcome.seconds)))


def counted(counts: Counter[str], name: str, method: Any) -> Any:
    """The method, counting its calls; those that come from another method of the recorder count with that one."""

    def call(self: Recorder, *given: Any, **named: Any) -> Any:
        counts[name] += 1
        return method(self, *given, **named)

    return call


def report(everywhere: list[dict[str, int]], seconds: float) -> dict[str, Any]:
    """Calls of the rank that calls most, seconds per call, and the share of the run that they come to."""
    busiest = max(everywhere, key=lambda counts: sum(counts.values()))
    busiest |= {"rest": 0, "routes": busiest.get("routed", 0)}  # the latter once a layer, at its own level only
    costs = {level: {name: seconds_of(level, name) for name in CALLS} for level in LEVELS}
    spent = {level: sum(n * costs[level][name] for name, n in busiest.items()) for level in LEVELS}
    share = {level: (spent[level] - spent["off"]) / seconds for level in LEVELS[1:]}
    return {"seconds": seconds, "calls": busiest, "seconds_per_call": costs, "share": share}


def seconds_of(level: str, name: str) -> float:
    """Median of five series of calls of one method, each on a recorder of its own."""
    series = []
    for _ in range(5):
        recorder = Recorder(level, 0, 2, 8, 32, 4)
        recorder.start()
        call = partial(CALLS[name], recorder)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            call()
        series.append((time.perf_counter() - begin) / REPEATS)
    return sorted(series)[2]


_COUNTS, _SEQUENCES = np.ones(32, np.int64), np.arange(ROWS)
_EXPERTS, _WEIGHTS = np.zeros((ROWS, 4), np.int64), np.zeros((ROWS, 4), np.float32)
CALLS: dict[str, Any] = {
    "lap": lambda r: r.lap(PROJECT, 3, KEY, ROWS),
    "rest": lambda r: r.rest(EXPOSED, 1),
    "span": lambda r: r.span(STEP, -1, KEY, 0, 1, ROWS, 0, -1),
    "sent": lambda r: r.sent(DISPATCH_KIND, 3, 1, ROWS, 4096),
    "received": lambda r: r.received(ANSWER_KIND, 3, 1, ROWS, 4096),
    "answered": lambda r: r.answered(1, 0),
    "waited": lambda r: r.waited(3, KEY, 0, 1, ROWS, 1),
    "routed": lambda r: r.routed(3, _COUNTS),
    "routes": lambda r: r.routes(3, 0, 1, _SEQUENCES, _SEQUENCES, _EXPERTS, _WEIGHTS),
}


if __name__ == "__main__":
    main()
