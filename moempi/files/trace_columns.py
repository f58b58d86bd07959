"""The columns of a trace: names, types, units, and which of them are counters that parts add up."""

from __future__ import annotations

from moempi.recorder import LEVELS, SIZE_CLASSES
from moempi.stages import KINDS, PHASES, STAGES

SHAPE = ("n_ranks", "n_layers", "n_experts", "top_k")

_PLACE = {
    "rank": ("i4", "", "rank"),
    "layer": ("i2", "", "layer of the model; -1: none"),
    "microbatch": ("i4", "", "microbatch slot on the rank; -1: none"),
    "step": ("i4", "", "forward step of the rank; -1: none"),
}
_DONE = {
    "phase": ("i1", "", "of the step: prefill where it holds tokens whose next token is not asked for"),
    "stage": ("i2", "", "what was done"),
}
_LINK = {
    "kind": ("i1", "", "dispatch, answer, or a hop between relays"),
    "layer": _PLACE["layer"],
    "source": ("i4", "", "rank that sent"),
    "destination": ("i4", "", "rank that received"),
    "rows": ("i8", "", "token rows"),
    "bytes": ("i8", "bytes", "bytes of these rows and their headers"),
    "messages": ("i8", "", "messages; rows that stay on their rank need none"),
}

# Columns of the merged file: name -> type, units, long name. A row of experts and weights is top_k wide.
COLUMNS: dict[str, dict[str, tuple[str, str, str]]] = {
    "wall": {
        "rank": _PLACE["rank"],
        "begin": ("i8", "ns", "first look at work, since the job's start on rank 0's clock"),
        "end": ("i8", "ns", "end of the last lap, since the job's start on rank 0's clock"),
        "time": ("i8", "ns", "between them, on the rank's own clock: what its leaf stages add up to"),
    },
    "spans": {
        **_PLACE,
        **_DONE,
        "peer": ("i4", "", "the other rank; -1: none"),
        "begin": ("i8", "ns", "begin, since the job's start on rank 0's clock"),
        "end": ("i8", "ns", "end, since the job's start on rank 0's clock"),
        "tokens": ("i8", "", "tokens or rows"),
        "bytes": ("i8", "bytes", "bytes that were moved"),
    },
    "sums": {
        "rank": _PLACE["rank"],
        **_DONE,
        "layer": _PLACE["layer"],
        "count": ("i8", "", "spans"),
        "time": ("i8", "ns", "sum of their durations"),
        "tokens": ("i8", "", "sum of their tokens or rows"),
    },
    "traffic": _LINK,
    "received": _LINK,
    "sizes": {
        "rank": ("i4", "", "rank that sent"),
        "kind": _LINK["kind"],
        "size_class": ("i1", "", "class c has the messages of 2^(c - 1) to 2^c - 1 bytes"),
        "messages": ("i8", "", "messages of that class"),
    },
    "waits": {
        "rank": ("i4", "", "rank that waited"),
        "peer": ("i4", "", "rank that it waited for"),
        "answers": ("i8", "", "answers that came from there"),
        "answer_time": ("i8", "ns", "sum over them of the time from posting the dispatch to the answer"),
        "waits": ("i8", "", "dispatches of a microbatch whose last rows came from there"),
        "wait_time": ("i8", "ns", "sum over them of the time from the last post to the last rows"),
        "exposed_time": ("i8", "ns", "time with nothing to do while the oldest unanswered dispatch was there"),
    },
    "routes": {
        **_PLACE,
        "sequence": ("i8", "", "row of the input"),
        "position": ("i4", "", "place in the sequence"),
        "experts": ("i2", "", "experts of the token, in the order of the gate"),
        "weights": ("f4", "", "their weights"),
    },
}
WIDE = ("experts", "weights")
LEGENDS = {"stage": STAGES, "kind": KINDS, "phase": PHASES}

# Counters: the column that says whose they are, and those that say of what; all others are added up.
OWNER = {"sums": "rank", "traffic": "source", "received": "destination", "sizes": "rank", "waits": "rank"}
KEYS = {
    "sums": ("phase", "stage", "layer"),
    "traffic": ("kind", "layer", "destination"),
    "received": ("kind", "layer", "source"),
    "sizes": ("kind", "size_class"),
    "waits": ("peer",),
}


def values_of(group: str) -> tuple[str, ...]:
    """The columns of a group of counters that are added up."""
    return tuple(name for name in COLUMNS[group] if name not in (OWNER[group], *KEYS[group]))


def ends_of(n_ranks: int, n_layers: int) -> dict[str, int]:
    """The least number that each key column may not hold any more."""
    ranks = dict.fromkeys(("source", "destination", "peer"), n_ranks)
    words = {name: len(legend) for name, legend in LEGENDS.items()}
    return ranks | words | {"layer": n_layers, "size_class": SIZE_CLASSES}


def groups_of(level: str) -> tuple[str, ...]:
    """The groups of columns that a trace of a level has."""
    depth = LEVELS.index(level)
    return ("wall", *OWNER, *(("spans",) if depth >= 2 else ()), *(("routes",) if depth >= 3 else ()))
