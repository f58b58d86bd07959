"""A trace in a few tables of plain values, as `moempi trace summary` prints them."""

from __future__ import annotations

from typing import Any

import numpy as np

from moempi.analysis.balance import busiest_per_layer, max_over_mean
from moempi.analysis.time import clock_error, spans_per_stage, time_per_stage
from moempi.analysis.trace import Trace
from moempi.recorder import KINDS, STAGES


def summarize(trace: Trace) -> dict[str, Any]:
    """Level, ranks, clocks, and the tables `time`, `load` and `traffic`, each a list of rows that are dicts."""
    return {
        "file": str(trace.path),
        "unfinished": trace.unfinished,
        "level": trace.level,
        "mode": trace.mode,
        "ranks": trace.n_ranks,
        "layers": trace.n_layers,
        "experts": trace.n_experts,
        "top_k": trace.top_k,
        "clock_error_ns": clock_error(trace),
        "run": trace.run,
        "time": _time(trace),
        "load": _load(trace),
        "traffic": _traffic(trace),
    }


def _time(trace: Trace) -> list[dict[str, Any]]:
    seconds, count = time_per_stage(trace), spans_per_stage(trace)
    return [
        {
            "rank": int(rank),
            "stage": STAGES[stage],
            "seconds": float(seconds[rank, stage]),
            "spans": int(count[rank, stage]),
        }
        for rank, stage in np.argwhere(count)
    ]


def _load(trace: Trace) -> list[dict[str, Any]]:
    ratio = max_over_mean(trace)
    return [
        {
            "layer": one.layer,
            "busiest_expert": one.expert,
            "busiest_expert_share": one.share,
            "max_over_mean": float(ratio[one.layer]),
            "tokens": int(trace.load[one.layer].sum()),
            "tokens_per_expert": trace.load[one.layer].tolist(),
        }
        for one in busiest_per_layer(trace)
    ]


def _traffic(trace: Trace) -> list[dict[str, Any]]:
    traffic, n = trace.traffic, trace.n_ranks
    link = (traffic["kind"].astype(np.int64) * n + traffic["source"]) * n + traffic["destination"]
    links, place = np.unique(link, return_inverse=True)
    totals = {name: np.zeros(len(links), dtype=np.int64) for name in ("rows", "bytes", "messages")}
    for name, total in totals.items():
        np.add.at(total, place, traffic[name])
    return [
        {
            "kind": KINDS[one // n**2],
            "source": int(one // n % n),
            "destination": int(one % n),
            **{name: int(total[row]) for name, total in totals.items()},
        }
        for row, one in enumerate(links)
    ]
