"""What a rank notes down while it runs: spans, load, traffic and routes, at a fraction of a microsecond each.

No MPI and no file here: `take` hands over all that is new as plain arrays, and `moempi.files.trace` writes them.
"""

from __future__ import annotations

import struct

import numpy as np

LEVELS = ("off", "summary", "full", "routes")

# What a span can be; the place in this table is the number in the trace. A span may lie inside another one.
STAGES = (
    "step",  # a microbatch's whole way through the layers
    "embed",
    "project",  # attention's products: queries, keys and values in, output out
    "attend",  # scores and mixing
    "dense",  # a layer without experts
    "gate",
    "dispatch",  # pack the rows and post the messages
    "wait",  # for the answers to a dispatch
    "combine",
    "head",  # logits and the choice of tokens
    "expert",  # one expert call
    "poll",
    "idle",
    "barrier",  # only with exchange.lockstep
    "admit",
    "commit",
    "load",  # reading the weights
)
(
    STEP, EMBED, PROJECT, ATTEND, DENSE, GATE, DISPATCH, WAIT, COMBINE,
    HEAD, EXPERT, POLL, IDLE, BARRIER, ADMIT, COMMIT, LOAD,
) = range(len(STAGES))  # fmt: skip

# Kinds of messages.
KINDS = ("dispatch", "answer")
DISPATCH_KIND, ANSWER_KIND = range(len(KINDS))

SPAN = np.dtype(
    [
        ("stage", "<i2"),
        ("layer", "<i2"),
        ("microbatch", "<i4"),
        ("step", "<i4"),
        ("peer", "<i4"),
        ("begin", "<i8"),
        ("end", "<i8"),
        ("tokens", "<i8"),
        ("bytes", "<i8"),
    ]
)
_pack = struct.Struct("<hhiiiqqqq").pack
_SPAN_COST = SPAN.itemsize + 41  # bytes that a packed span takes in memory, with Python's own


class Recorder:
    """Collects what one rank does; every method but `take` is made for the hot path.

    Args:
        level: one of LEVELS. off: nothing; summary: load, traffic, time per stage and layer; full: and every span;
            routes: and every token's experts and weights.
        n_layers: all layers of the model, with and without experts; layer numbers are the model's.
    """

    def __init__(self, level: str, rank: int, n_ranks: int, n_layers: int, n_experts: int, top_k: int) -> None:
        self.level = level
        self.rank = rank
        self.n_ranks, self.n_layers, self.n_experts, self.top_k = n_ranks, n_layers, n_experts, top_k
        depth = LEVELS.index(level)
        self._on, self._full, self._with_routes = depth >= 1, depth >= 2, depth >= 3
        self._clear()

    def describe(self) -> dict[str, int | str]:
        """What the arrays' shapes depend on; goes into every part and into the trace."""
        return {
            "level": self.level,
            "n_ranks": self.n_ranks,
            "n_layers": self.n_layers,
            "n_experts": self.n_experts,
            "top_k": self.top_k,
        }

    def span(
        self,
        stage: int,
        layer: int,
        microbatch: int,
        step: int,
        begin: int,
        end: int,
        tokens: int,
        nbytes: int,
        peer: int,
    ) -> None:
        """Something took from `begin` to `end`, in ns of time.perf_counter_ns(); what there is none of is -1 (or 0)."""
        if self._full:
            self._spans.append(_pack(stage, layer, microbatch, step, peer, begin, end, tokens, nbytes))
        elif self._on:
            place = stage * self._stride + layer + 1
            self._count[place] += 1
            self._time[place] += end - begin

    @property
    def load(self) -> np.ndarray:
        """Tokens per layer and expert since the last `take`, int64 [L, E]."""
        return self._load

    def routed(self, layer: int, counts: np.ndarray) -> None:
        """The gate of this rank sent counts[e] tokens of a layer to expert e: int [E]."""
        if self._on:
            self._load[layer] += counts

    def sent(self, kind: int, layer: int, destination: int, rows: int, nbytes: int) -> None:
        """Rows went to a rank as one message of `nbytes`; to this rank itself they go without a message."""
        if self._on:
            place = (kind * self.n_layers + layer) * self.n_ranks + destination
            self._rows[place] += rows
            self._bytes[place] += nbytes
            if destination != self.rank:
                self._messages[place] += 1

    def routes(
        self,
        layer: int,
        microbatch: int,
        step: int,
        sequence: np.ndarray,
        position: np.ndarray,
        experts: np.ndarray,
        weights: np.ndarray,
    ) -> None:
        """Experts and weights that the gate chose; the arrays are copied, so the caller may use them again.

        Args:
            sequence: int64 [T], row of the input.
            position: int32 [T], place in the sequence.
            experts: int16 [T, K].
            weights: float32 [T, K].
        """
        if self._with_routes:
            where = np.empty((len(sequence), 3), dtype=np.int32)  # [T, 3]
            where[:] = (microbatch, step, layer)
            chunk = (
                where,
                np.array(sequence, dtype=np.int64),
                np.array(position, dtype=np.int32),
                np.array(experts, dtype=np.int16),
                np.array(weights, dtype=np.float32),
            )
            self._routes.append(chunk)
            self._route_bytes += sum(part.nbytes for part in chunk)

    def size(self) -> int:
        """Bytes that are held of spans and routes; the counters never grow."""
        return len(self._spans) * _SPAN_COST + self._route_bytes

    def take(self) -> dict[str, np.ndarray]:
        """All that is new since the last call, which is forgotten here; {} at level off.

        spans/* (from level full) and routes/* (level routes) are columns; load is int64 [L, E]; sums/* and traffic/*
        are columns with one row for every (stage, layer) and (kind, layer, destination) that something happened at.
        """
        if not self._on:
            return {}
        arrays = {"load": self._load, **self._taken_traffic()}
        if self._full:
            spans = np.frombuffer(b"".join(self._spans), dtype=SPAN)
            arrays |= {f"spans/{name}": np.ascontiguousarray(spans[name]) for name in SPAN.names or ()}
            self._add_up(spans)
        if self._with_routes:
            arrays |= self._taken_routes()
        arrays |= self._taken_sums()
        self._clear()
        return arrays

    def _clear(self) -> None:
        self._stride = self.n_layers + 1  # layer -1 comes first
        places = len(STAGES) * self._stride
        links = len(KINDS) * self.n_layers * self.n_ranks
        # Lists: adding to one element is several times faster than in an array.
        self._count, self._time = [0] * places, [0] * places
        self._rows, self._bytes, self._messages = [0] * links, [0] * links, [0] * links
        self._load = np.zeros((self.n_layers, self.n_experts), dtype=np.int64)  # [L, E]
        self._spans: list[bytes] = []
        self._routes: list[tuple[np.ndarray, ...]] = []
        self._route_bytes = 0

    def _add_up(self, spans: np.ndarray) -> None:
        place = spans["stage"].astype(np.int64) * self._stride + spans["layer"] + 1
        # float64 sums of whole ns are exact up to 104 days.
        time = np.bincount(place, weights=spans["end"] - spans["begin"], minlength=len(self._time))
        self._count = np.bincount(place, minlength=len(self._count)).tolist()
        self._time = time.astype(np.int64).tolist()

    def _taken_sums(self) -> dict[str, np.ndarray]:
        count, time = np.array(self._count, dtype=np.int64), np.array(self._time, dtype=np.int64)
        place = np.flatnonzero(count)
        stage, layer = np.divmod(place, self._stride)
        return {
            "sums/stage": stage.astype(np.int16),
            "sums/layer": (layer - 1).astype(np.int16),
            "sums/count": count[place],
            "sums/time": time[place],
        }

    def _taken_traffic(self) -> dict[str, np.ndarray]:
        rows, sizes, messages = (np.array(one, dtype=np.int64) for one in (self._rows, self._bytes, self._messages))
        place = np.flatnonzero(rows | sizes | messages)
        kind, layer, destination = np.unravel_index(place, (len(KINDS), self.n_layers, self.n_ranks))
        return {
            "traffic/kind": kind.astype(np.int8),
            "traffic/layer": layer.astype(np.int16),
            "traffic/destination": destination.astype(np.int32),
            "traffic/rows": rows[place],
            "traffic/bytes": sizes[place],
            "traffic/messages": messages[place],
        }

    def _taken_routes(self) -> dict[str, np.ndarray]:
        empty = (
            np.empty((0, 3), np.int32),
            np.empty(0, np.int64),
            np.empty(0, np.int32),
            np.empty((0, self.top_k), np.int16),
            np.empty((0, self.top_k), np.float32),
        )
        where, sequence, position, experts, weights = (
            np.concatenate(columns) for columns in zip(empty, *self._routes, strict=True)
        )
        return {
            "routes/microbatch": where[:, 0],
            "routes/step": where[:, 1],
            "routes/layer": where[:, 2].astype(np.int16),
            "routes/sequence": sequence,
            "routes/position": position,
            "routes/experts": experts,
            "routes/weights": weights,
        }
