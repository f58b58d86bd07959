"""Rows that wait for the experts of a GPU: a call takes what waits for a layer, whole arrivals at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from moempi.device.cuda_experts import Batch, Layer
from moempi.exchange.arrivals import Arrival, Experts
from moempi.planning.gpu_memory import CALL_ROWS

CALLS_AHEAD = 2  # expert calls that the GPU has queued: one computes, the next one is there when it ends
FEW_ROWS = 128  # to a slot; below, a call takes as long as reading the weights, and two calls take twice as long
READ_RATE = 3e12  # bytes per second at which a GPU reads them


class CudaExperts(Experts):
    """The slots of this rank, layer by layer.

    A call of few rows waits for the homes that have sent few rows of late, up to the time that a further call would
    take: it is never late by more than that, and often saves it.

    Args:
        layers: the experts of every layer that the rank has slots of.
        memory: of messages, flat, in the model's dtype.
    """

    def __init__(self, layers: Mapping[int, Layer], memory: Tensor):
        super().__init__({})
        self._layers, self._memory = layers, memory
        self._waiting: dict[int, deque[Arrival]] = {}  # by layer, only of layers that have any, the first to come first
        self._came: dict[int, int] = {}  # when the first of them did (ns)
        self._expected: set[int] = set()  # homes whose last rows were few
        self.in_flight = 0  # calls that have been launched and not ended

    def __bool__(self) -> bool:
        return bool(self._waiting) and self.in_flight < CALLS_AHEAD and self._next() is not None

    @property
    def waiting(self) -> bool:
        """Whether rows wait, even if a call would wait for more."""
        return bool(self._waiting)

    def _next(self) -> int | None:
        """The layer to be computed now; None where rows should wait for others."""
        fullest = max(self._waiting, key=self._rows_of)
        if not self._is_few(fullest, self._rows_of(fullest)):
            return fullest
        first = next(iter(self._waiting))
        here = {arrival.source for queue in self._waiting.values() for arrival in queue}
        if not self._expected <= here:
            if time.perf_counter_ns() - self._came[first] < 1e9 * self._layers[first].nbytes / READ_RATE:
                return None
            self._expected &= here
        return first

    def _rows_of(self, layer: int) -> int:
        return sum(arrival.left for arrival in self._waiting[layer])

    def _is_few(self, layer: int, rows: int) -> bool:
        return rows < FEW_ROWS * self._layers[layer].slots

    def add(self, arrival: Arrival) -> None:
        """Queue an arrival; its rows can be computed from now on."""
        now = time.perf_counter_ns()
        if not self._waiting:
            self.since = now
        if arrival.layer not in self._waiting:
            self._came[arrival.layer] = now
        self._waiting.setdefault(arrival.layer, deque()).append(arrival)
        if self._is_few(arrival.layer, arrival.left):
            self._expected.add(arrival.source)
        else:
            self._expected.discard(arrival.source)

    def serve(self, most_rows: int) -> tuple[int, int, list[Arrival]]:
        """Launch one call of a layer; who launches counts `in_flight`.

        Returns:
            The layer, the rows, and the arrivals that are complete once the call has ended.
        """
        layer = self._next()
        assert layer is not None, "asked for while rows should wait"
        queue, rows = self._waiting[layer], 0
        taken: list[Arrival] = []
        while queue and (not taken or rows + queue[0].left <= CALL_ROWS):
            taken.append(queue.popleft())
            rows += taken[-1].left
        if not queue:
            del self._waiting[layer]
        self._layers[layer]([Batch(a.rows, a.answer, a.rows_per_slot) for a in taken], self._memory)
        for arrival in taken:
            arrival.left = 0
        self.rows_computed += rows
        self.calls += 1
        return layer, rows, taken
