"""A trace in a few tables of plain values, as `moempi trace summary` prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from moempi.analysis.balance import busiest_per_layer, max_over_mean
from moempi.analysis.time import (
    clock_error,
    coverage,
    expert_utilisation,
    idle_shares,
    spans_per_stage,
    steps_per_phase,
    time_per_stage,
    wall_time,
)
from moempi.analysis.trace import Trace
from moempi.analysis.traffic import node_matrix, size_histogram
from moempi.stages import CONTAINERS, KINDS, PHASES, STAGES


def summarize(trace: Trace) -> dict[str, Any]:
    """Level, ranks, clocks, and a table for every section, each a list of rows that are dicts.

    Sections: ranks, time, phases, waits, load, traffic, nodes, sizes.
    """
    return {
        "file": str(trace.path),
        "unfinished": trace.unfinished,
        "level": trace.level,
        "mode": trace.mode,
        "n_ranks": trace.n_ranks,
        "layers": trace.n_layers,
        "experts": trace.n_experts,
        "top_k": trace.top_k,
        "clock_error_ns": clock_error(trace),
        "run": trace.run,
        "ranks": _ranks(trace),
        "time": _time(trace),
        "phases": _phases(trace),
        "waits": _waits(trace),
        "load": _load(trace),
        "traffic": _traffic(trace),
        "nodes": _nodes(trace),
        "sizes": _sizes(trace),
    }


def _ranks(trace: Trace) -> list[dict[str, Any]]:
    computed, could = expert_utilisation(trace)
    shares = {"coverage": coverage(trace), "experts_computed": computed, "experts_had_rows": could}
    shares |= {f"{stage}_share": share for stage, share in idle_shares(trace).items()}
    wall = wall_time(trace)
    return [
        {"rank": rank, "wall_seconds": float(wall[rank]), **{name: _known(one[rank]) for name, one in shares.items()}}
        for rank in range(trace.n_ranks)
    ]


def _known(value: float) -> float | None:
    """JSON knows no nan."""
    return None if math.isnan(value) else float(value)


def _time(trace: Trace) -> list[dict[str, Any]]:
    seconds, count = time_per_stage(trace), spans_per_stage(trace)
    return [
        {
            "rank": int(rank),
            "stage": STAGES[stage],
            "container": STAGES[stage] in CONTAINERS,
            "seconds": float(seconds[rank, stage]),
            "spans": int(count[rank, stage]),
        }
        for rank, stage in np.argwhere(count)
    ]


def _phases(trace: Trace) -> list[dict[str, Any]]:
    rows = []
    for name, (steps, tokens, seconds) in steps_per_phase(trace).items():
        stages = time_per_stage(trace, PHASES.index(name)).sum(axis=0)
        of_stage = {STAGES[s]: float(stages[s]) for s in np.flatnonzero(stages) if STAGES[s] not in CONTAINERS}
        rows.append(
            {"phase": name, "steps": steps, "tokens": tokens, "step_seconds": seconds, "stage_seconds": of_stage}
        )
    return rows


def _waits(trace: Trace) -> list[dict[str, Any]]:
    waits = trace.waits
    return [
        {
            "rank": int(waits["rank"][row]),
            "peer": int(waits["peer"][row]),
            "answers": int(waits["answers"][row]),
            "waits": int(waits["waits"][row]),
            **{f"{name}_seconds": float(waits[f"{name}_time"][row] / 1e9) for name in ("answer", "wait", "exposed")},
        }
        for row in range(len(waits["rank"]))
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


def _nodes(trace: Trace) -> list[dict[str, Any]]:
    names, rows = ("rows", "bytes", "messages"), []
    for kind in KINDS:
        tables: Mapping[str, np.ndarray | None] = {name: node_matrix(trace, kind, name) for name in names}
        known = {name: table for name, table in tables.items() if table is not None}
        for source, destination in np.argwhere(known["rows"]) if known else ():
            counts = {name: int(table[source, destination]) for name, table in known.items()}
            rows.append({"kind": kind, "source": int(source), "destination": int(destination), **counts})
    return rows


def _sizes(trace: Trace) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "least_bytes": int(2**size_class // 2), "messages": int(found[size_class])}
        for kind in KINDS
        for found in [size_histogram(trace, kind)]
        for size_class in np.flatnonzero(found)
    ]
