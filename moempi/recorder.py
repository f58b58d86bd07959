"""What a rank notes down while it runs: spans, load, traffic, waits and routes, at a fraction of a microsecond each.

A stopwatch: every `lap` ends now and begins where the last one ended, so a rank's laps add up to its wall time by
construction, whatever the machine does meanwhile. No MPI and no file here: `take` hands over all that is new as plain
arrays, and `moempi.files.trace` writes them.
"""

from __future__ import annotations

import struct
from time import perf_counter_ns

import numpy as np

from moempi.stages import (
    ANSWER,
    ANSWER_KIND,
    COLLECT_KIND,
    DISPATCH,
    DISPATCH_KIND,
    EXPOSED,
    KINDS,
    NO_STEP,
    PHASES,
    RELAY,
    STAGES,
    WAIT,
    StepKey,
)

LEVELS = ("off", "summary", "full", "routes")

SPAN = np.dtype(
    [
        ("stage", "i1"),
        ("phase", "i1"),
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
_pack = struct.Struct("<bbhiiiqqqq").pack
_SPAN_COST = SPAN.itemsize + 41  # bytes that a packed span takes in memory, with Python's own
PART_BYTES = 64 * 2**20  # of notes in memory, before they are handed over to be written
PARTS_HELD = 3  # at most, where the disk is slow: one that grows, one that waits and one that is written
SIZE_CLASSES = 64  # of messages: class c holds 2^(c - 1) to 2^c - 1 bytes


class Recorder:
    """Collects what one rank does; every method but `take` is made for the hot path.

    Args:
        level: one of LEVELS. off: nothing; summary: load, traffic, waits, time per stage, phase and layer; full: and
            every span; routes: and every token's experts and weights.
        n_layers: all layers of the model, with and without experts; layer numbers are the model's.

    Attributes:
        since: end of the last lap (ns of time.perf_counter_ns()).
        dispatching: the step whose rows `sent` is told of; whoever dispatches sets it.
    """

    def __init__(self, level: str, rank: int, n_ranks: int, n_layers: int, n_experts: int, top_k: int) -> None:
        self.level = level
        self.rank = rank
        self.n_ranks, self.n_layers, self.n_experts, self.top_k = n_ranks, n_layers, n_experts, top_k
        depth = LEVELS.index(level)
        self._on, self._full, self._with_routes = depth >= 1, depth >= 2, depth >= 3
        self.dispatching = NO_STEP
        self._begin = self.since = 0
        self._resting: tuple[int, int] | None = None  # (stage, peer) of a rest that may go on
        self._rest_begin = 0
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

    # ------------------------------------------------------------ time

    def start(self) -> None:
        """The rank's work begins: the first lap counts from now."""
        self._begin = self.since = perf_counter_ns()

    def lap(
        self,
        stage: int,
        layer: int = -1,
        key: StepKey = NO_STEP,
        tokens: int = 0,
        nbytes: int = 0,
        peer: int = -1,
        end: int = 0,
    ) -> None:
        """All since the last lap was this leaf stage; what there is none of is -1 (or 0).

        Args:
            end: when it ended, if that is not now.
        """
        if self._on:
            if self._resting is not None:
                self._end_rest()
            end = end or perf_counter_ns()
            self.span(stage, layer, key, self.since, end, tokens, nbytes, peer)
            self.since = end

    def rest(self, stage: int, peer: int = -1) -> None:
        """A lap with nothing to do; one like the last goes on with it, so that a long rest is one span."""
        if self._on:
            if self._resting != (stage, peer):
                self._end_rest()
                self._resting, self._rest_begin = (stage, peer), self.since
            self.since = perf_counter_ns()

    def _end_rest(self) -> None:
        if self._resting is not None:
            stage, peer = self._resting
            self._resting = None
            self.span(stage, -1, NO_STEP, self._rest_begin, self.since, 0, 0, peer)
            if stage == EXPOSED:
                self._exposed_time[peer] += self.since - self._rest_begin

    def span(
        self, stage: int, layer: int, key: StepKey, begin: int, end: int, tokens: int, nbytes: int, peer: int
    ) -> None:
        """Something took from `begin` to `end`, in ns of time.perf_counter_ns(). For containers; leaves are laps."""
        if self._full:
            microbatch, step, phase = key
            self._spans.append(_pack(stage, phase, layer, microbatch, step, peer, begin, end, tokens, nbytes))
        elif self._on:
            place = (key[2] * len(STAGES) + stage) * self._stride + layer + 1
            self._count[place] += 1
            self._time[place] += end - begin
            self._tokens[place] += tokens

    # ------------------------------------------------------------ messages

    def sent(self, kind: int, layer: int, destination: int, rows: int, nbytes: int, message: int = -1) -> None:
        """Rows went to a rank as one message of `nbytes`, a lap; to this rank itself they go without a message.

        Args:
            message: bytes of the message where others share it, 0 where it counts with one of those; -1: `nbytes`.
        """
        if self._on:
            place = (kind * self.n_layers + layer) * self.n_ranks + destination
            self._sent_rows[place] += rows
            self._sent_bytes[place] += nbytes
            if destination != self.rank and message:
                nbytes = nbytes if message < 0 else message
                self._sent_messages[place] += 1
                self._sizes[kind * SIZE_CLASSES + nbytes.bit_length()] += 1
                if kind in (DISPATCH_KIND, COLLECT_KIND):
                    self.lap(DISPATCH, layer, self.dispatching, rows, nbytes, destination)
                else:
                    self.lap(ANSWER if kind == ANSWER_KIND else RELAY, layer, NO_STEP, rows, nbytes, destination)

    def received(self, kind: int, layer: int, source: int, rows: int, nbytes: int, messages: int = 1) -> None:
        """A message of another rank is here, or (messages 0) more rows of one that counts already."""
        if self._on:
            place = (kind * self.n_layers + layer) * self.n_ranks + source
            self._received_rows[place] += rows
            self._received_bytes[place] += nbytes
            self._received_messages[place] += messages

    def answered(self, peer: int, posted: int) -> None:
        """The answer to a dispatch to `peer`, of which posting began at `posted` (ns), is here."""
        if self._on:
            self._answers[peer] += 1
            self._answer_time[peer] += perf_counter_ns() - posted

    def waited(self, layer: int, key: StepKey, begin: int, end: int, rows: int, peer: int) -> None:
        """A microbatch's rows were away from `begin` to `end`; the last of them came from `peer`."""
        if self._on:
            self.span(WAIT, layer, key, begin, end, rows, 0, peer)
            self._waits[peer] += 1
            self._wait_time[peer] += end - begin

    # ------------------------------------------------------------ routes

    @property
    def load(self) -> np.ndarray:
        """Tokens per layer and expert since the last `take`, int64 [L, E]."""
        return self._load

    def routed(self, layer: int, counts: np.ndarray) -> None:
        """The gate of this rank sent counts[e] tokens of a layer to expert e: int [E]."""
        if self._on:
            self._load[layer] += counts

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

    # ------------------------------------------------------------ handing over

    def size(self) -> int:
        """Bytes that are held of spans and routes; the counters never grow."""
        return len(self._spans) * _SPAN_COST + self._route_bytes

    def take(self) -> dict[str, np.ndarray]:
        """All that is new since the last call, which is forgotten here; {} at level off.

        spans/* (from level full) and routes/* (level routes) are columns; load is int64 [L, E]; wall/* is one row,
        from the end of the last call's laps to that of this one's; sums/*, traffic/*, received/*, waits/* and sizes/*
        are columns with one row for everything that happened.
        """
        if not self._on:
            return {}
        self._end_rest()
        arrays = {"load": self._load, **self._taken_wall()}
        if self._full:
            spans = np.frombuffer(b"".join(self._spans), dtype=SPAN)
            arrays |= {f"spans/{name}": np.ascontiguousarray(spans[name]) for name in SPAN.names or ()}
            self._add_up(spans)
        if self._with_routes:
            arrays |= self._taken_routes()
        arrays |= self._taken_counters()
        self._clear()
        return arrays

    def _clear(self) -> None:
        self._stride = self.n_layers + 1  # layer -1 comes first
        places = len(PHASES) * len(STAGES) * self._stride
        links = len(KINDS) * self.n_layers * self.n_ranks
        # Lists: adding to one element is several times faster than in an array.
        self._count, self._time, self._tokens = [0] * places, [0] * places, [0] * places
        self._sent_rows, self._sent_bytes, self._sent_messages = [0] * links, [0] * links, [0] * links
        self._received_rows, self._received_bytes, self._received_messages = [0] * links, [0] * links, [0] * links
        self._sizes = [0] * (len(KINDS) * SIZE_CLASSES)
        ranks = self.n_ranks
        self._answers, self._answer_time = [0] * ranks, [0] * ranks
        self._waits, self._wait_time, self._exposed_time = [0] * ranks, [0] * ranks, [0] * ranks
        self._load = np.zeros((self.n_layers, self.n_experts), dtype=np.int64)  # [L, E]
        self._spans: list[bytes] = []
        self._routes: list[tuple[np.ndarray, ...]] = []
        self._route_bytes = 0

    def _add_up(self, spans: np.ndarray) -> None:
        stage = spans["phase"].astype(np.int64) * len(STAGES) + spans["stage"]
        place, n = stage * self._stride + spans["layer"] + 1, len(self._time)
        self._count = np.bincount(place, minlength=n).tolist()
        # float64 sums of whole ns are exact up to 104 days.
        time = np.bincount(place, weights=spans["end"] - spans["begin"], minlength=n)
        tokens = np.bincount(place, weights=spans["tokens"], minlength=n)
        self._time, self._tokens = time.astype(np.int64).tolist(), tokens.astype(np.int64).tolist()

    def _taken_wall(self) -> dict[str, np.ndarray]:
        rows = 1 if self.since else 0  # none where the work has not begun
        begin, end = np.array([self._begin] * rows, dtype=np.int64), np.array([self.since] * rows, dtype=np.int64)
        self._begin = self.since
        return {"wall/begin": begin, "wall/end": end, "wall/time": end - begin}

    def _taken_counters(self) -> dict[str, np.ndarray]:
        links = {"kind": len(KINDS), "layer": self.n_layers}
        stages = {"phase": len(PHASES), "stage": len(STAGES), "layer": self._stride}
        arrays = _nonzero("sums", stages, count=self._count, time=self._time, tokens=self._tokens)
        arrays["sums/layer"] -= 1
        arrays |= _nonzero(
            "traffic",
            links | {"destination": self.n_ranks},
            rows=self._sent_rows,
            bytes=self._sent_bytes,
            messages=self._sent_messages,
        )
        arrays |= _nonzero(
            "received",
            links | {"source": self.n_ranks},
            rows=self._received_rows,
            bytes=self._received_bytes,
            messages=self._received_messages,
        )
        arrays |= _nonzero("sizes", {"kind": len(KINDS), "size_class": SIZE_CLASSES}, messages=self._sizes)
        return arrays | _nonzero(
            "waits",
            {"peer": self.n_ranks},
            answers=self._answers,
            answer_time=self._answer_time,
            waits=self._waits,
            wait_time=self._wait_time,
            exposed_time=self._exposed_time,
        )

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


def _nonzero(group: str, shape: dict[str, int], **counters: list[int]) -> dict[str, np.ndarray]:
    """Counters that lie flat, as columns: a row for every place where one is not 0; `shape` is {key: its values}."""
    arrays = {name: np.array(values, dtype=np.int64) for name, values in counters.items()}
    place = np.flatnonzero(np.logical_or.reduce(list(arrays.values())))
    keys = dict(zip(shape, np.unravel_index(place, tuple(shape.values())), strict=True))
    columns = keys | {name: values[place] for name, values in arrays.items()}
    return {f"{group}/{name}": values for name, values in columns.items()}
