"""The tables of cluster_routes.py, made from its raw figures."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from decode_report import table
from rounds import about

Key = tuple[str, str, str]  # shape, rate, load
Runs = list[dict[str, Any]]


def render(results: dict[str, Any]) -> str:
    """Everything that docs/performance.md shows of a measurement."""
    cases: dict[Key, dict[str, Runs]] = defaultdict(lambda: defaultdict(list))
    for run in results["runs"]:
        cases[run["shape"], run["rate"], run["load"]][run["route"]].append(run)
    parts = [about(results), times(cases), "Bytes that leave the busiest node:", bytes_of(cases)]
    if results.get("links"):
        parts += ["Links as measured before, medians over pairs of ranks:", links(results["links"])]
    return "\n\n".join(parts)


def times(cases: dict[Key, dict[str, Runs]]) -> str:
    """Seconds of every route, the best of them, what `auto` chose and what it loses to the best."""
    routes = sorted({route for case in cases.values() for route in case} - {"auto"})
    rows = []
    for (shape, rate, load), found in cases.items():
        seconds = {route: median(run["seconds"] for run in found[route]) for route in routes if found[route]}
        shown = [spread(found[route]) if found[route] else "" for route in routes]
        best = min(seconds, key=seconds.__getitem__, default="")
        rows.append([shape, rate, load, *shown, best, *choice(found["auto"], seconds)])
    head = ["nodes", "links", "load", *(f"{route}, s" for route in routes), "best", "auto, s", "auto took", "it loses"]
    return table(head, rows)


def spread(runs: Runs) -> str:
    """The median of the seconds, with the smallest and the largest of several."""
    seconds = [run["seconds"] for run in runs]
    return f"{median(seconds):.2f}" + f" ({min(seconds):.2f} to {max(seconds):.2f})" * (len(seconds) > 1)


def choice(auto: Runs, seconds: dict[str, float]) -> list[str]:
    """Seconds of `auto`, the route that it took, and how much longer that route takes than the best one.

    The last is told from the runs of the routes themselves: `auto` then runs the same program.
    """
    if not auto:
        return ["", "", ""]
    taken = sorted({run["chosen"] for run in auto})
    known = [route for route in taken if route in seconds]
    loss = f"{max(seconds[route] for route in known) / min(seconds.values()) - 1:.1%}" if known else ""
    return [spread(auto), " or ".join(taken), loss]


def bytes_of(cases: dict[Key, dict[str, Runs]]) -> str:
    """What the trace counted, what the interface counted, and what the protocols add to it."""
    rows = []
    for (shape, rate, load), found in cases.items():
        for route, runs in found.items():
            if not runs:
                continue
            traced = median(max(run["traced_bytes"]) for run in runs)
            # Only leaders send in one of the routes: the busiest node is looked for in each run.
            wire = median(max(map(int.__sub__, run["link_bytes"], run["start_bytes"])) for run in runs)
            messages = median(max(run["traced_messages"]) for run in runs)
            added = f"{wire / traced - 1:.1%}" if traced else ""
            rows.append([shape, rate, load, route, f"{traced / 1e6:.2f}", f"{messages:.0f}"])
            rows[-1] += [f"{wire / 1e6:.2f}", added]
    head = ["nodes", "links", "load", "route", "rows and headers, MB", "messages", "on the link, MB", "protocols add"]
    note = (
        "On the link: the interface's counter, less that of a job of one token. Protocols add headers, "
        "acknowledgements, prompts, completions and signs of life."
    )
    return f"{table(head, rows)}\n\n{note}"


def links(found: dict[str, dict[str, float]]) -> str:
    """Latency and bandwidth by shape and rate."""
    rows = []
    for name, medians in found.items():
        cells = [f"{medians[f'{where} latency'] * 1e6:.0f}" for where in ("inside", "between")]
        cells += [f"{medians[f'{where} bandwidth'] / 1e6:.0f}" for where in ("inside", "between")]
        rows.append([name, *cells])
    head = ["nodes, links", "latency inside, us", "between, us", "bandwidth inside, MB/s", "between, MB/s"]
    return table(head, rows)
