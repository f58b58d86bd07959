"""The table of lockstep.py, made from its raw figures."""

from __future__ import annotations

from statistics import median
from typing import Any

from decode_report import table
from rounds import about

Runs = list[dict[str, Any]]


def render(results: dict[str, Any]) -> str:
    """Everything that docs/performance.md shows of a measurement."""
    rows = []
    for where, load in dict.fromkeys((run["where"], run["load"]) for run in results["runs"]):
        ways = [
            [run for run in results["runs"] if (run["where"], run["load"], run["lockstep"]) == (where, load, way)]
            for way in (False, True)
        ]
        if all(ways):
            rows.append([where, load, *compare(*ways)])
    head = [
        "where",
        "load",
        "busiest expert",
        "message-driven, s",
        "lockstep, s",
        "ratio",
        "experts idle",
        "in lockstep",
    ]
    return f"{about(results)} {agreement(results['runs'])}\n\n{table(head, rows)}\n\n{NOTE}"


NOTE = (
    "Busiest expert: its share of the tokens of its layer, and that over the mean. Ratio: the median over rounds of "
    "lockstep / message-driven. Idle: the share of the job's seconds in which a rank's experts did not compute, mean "
    "over ranks; with fewer cores than ranks much of it is waiting for a core, in both ways."
)


def agreement(runs: Runs) -> str:
    """Whether all runs of a load gave the same tokens, as they have to."""
    same = len({(run["load"], run["tokens_digest"]) for run in runs}) == len({run["load"] for run in runs})
    return "All runs of a load gave the same tokens." if same else "**Runs of one load gave different tokens.**"


def compare(free: Runs, lockstep: Runs) -> list[str]:
    """The cells of one line: two ways of one load."""
    pairs = [(one["seconds"], other["seconds"]) for one in free for other in lockstep if one["round"] == other["round"]]
    ratio = f"{median(other / one for one, other in pairs):.2f}" if pairs else ""
    busiest = (
        f"{median(run['busiest_share'] for run in free):.0%}, {median(run['max_over_mean'] for run in free):.1f} x"
    )
    seconds = [f"{median(run['seconds'] for run in runs):.2f}" for runs in (free, lockstep)]
    return [busiest, *seconds, ratio, *(f"{median(map(idle, runs)):.0%}" for runs in (free, lockstep))]


def idle(run: dict[str, Any]) -> float:
    """Share of the job's time in which a rank's experts did not compute, mean over ranks."""
    seconds = run["expert_seconds"]
    return float(1 - sum(seconds) / (len(seconds) * run["seconds"]))
