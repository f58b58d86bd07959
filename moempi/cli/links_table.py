"""Measured links as a table: every pair of ranks, or every pair of nodes where there are many."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from moempi.planning.memory import show_bytes

if TYPE_CHECKING:
    from moempi.files.links import MeasuredLinks

MOST_PAIRS = 28  # of ranks that are shown one by one: those of 8 ranks
_SHOWN = (1, 4096, 2**20)  # bytes: of these sizes, or the next smaller measured ones, times are shown


def links_table(links: MeasuredLinks) -> list[str]:
    """Lines for a terminal. Pairs of nodes are shown by medians over their pairs of ranks."""
    single = len(links.source) <= MOST_PAIRS
    groups = {f"{a} - {b}": [p] for p, (a, b) in enumerate(_ends(links))} if single else _by_nodes(links)
    sizes = sorted({int(np.searchsorted(links.size, size, side="right")) - 1 for size in _SHOWN})
    head = ["ranks" if single else "nodes", *(["nodes"] if single else ["pairs"])]
    head += ["latency, us", "bandwidth, MB/s", *(f"{show_bytes(int(links.size[s]))}, us" for s in sizes)]
    rows = [head]
    for name, pairs in groups.items():
        second = _nodes_of(links, pairs[0]) if single else str(len(pairs))
        latency, bandwidth = np.median(links.latency[pairs]), np.median(links.bandwidth[pairs])
        times = np.median(links.time[pairs], axis=0)
        rows.append([name, second, f"{latency * 1e6:.1f}", f"{bandwidth / 1e6:.1f}"])
        rows[-1] += [f"{times[s] * 1e6:.1f}" for s in sizes]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    n_nodes = len(set(links.node.tolist()))
    where = f"{len(links.node)} ranks on {n_nodes} node{'s' * (n_nodes > 1)}"
    gpus = "" if set(links.device) == {"cpu"} else " from GPU to GPU"
    title = f"{where}; a message{gpus} takes latency + bytes / bandwidth"
    return [title, *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)]


def as_dict(links: MeasuredLinks) -> dict[str, Any]:
    """All that was measured, for JSON: times in s, bandwidth in bytes/s."""
    pairs = [
        {
            "source": source,
            "destination": destination,
            "latency": float(links.latency[p]),
            "bandwidth": float(links.bandwidth[p]),
            "time": links.time[p].tolist(),
        }
        for p, (source, destination) in enumerate(_ends(links))
    ]
    ranks = {"node": links.node.tolist(), "host": links.host, "device": links.device}
    return {"size": links.size.tolist(), **ranks, "pairs": pairs}


def _ends(links: MeasuredLinks) -> list[tuple[int, int]]:
    return list(zip(links.source.tolist(), links.destination.tolist(), strict=True))


def _by_nodes(links: MeasuredLinks) -> dict[str, list[int]]:
    """The pairs of ranks of every pair of nodes; "0" stands for those inside node 0."""
    groups: dict[str, list[int]] = defaultdict(list)
    for p in np.lexsort([links.node[links.destination], links.node[links.source]]).tolist():
        groups[_nodes_of(links, p)].append(p)
    return dict(groups)


def _nodes_of(links: MeasuredLinks, pair: int) -> str:
    low, high = sorted((int(links.node[links.source[pair]]), int(links.node[links.destination[pair]])))
    return str(low) if low == high else f"{low} - {high}"
