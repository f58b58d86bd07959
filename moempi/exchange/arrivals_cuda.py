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


class CudaExperts(Experts):
    """The slots of this rank, layer by layer.

    Args:
        layers: the experts of every layer that the rank has slots of.
        memory: of messages, flat, in the model's dtype.
    """

    def __init__(self, layers: Mapping[int, Layer], memory: Tensor):
        super().__init__({})
        self._layers, self._memory = layers, memory
        self._waiting: dict[int, deque[Arrival]] = {}  # by layer, only of layers that have any
        self.in_flight = 0  # calls that have been launched and not ended

    def __bool__(self) -> bool:
        return bool(self._waiting) and self.in_flight < CALLS_AHEAD

    def add(self, arrival: Arrival) -> None:
        """Queue an arrival; its rows can be computed from now on."""
        if not self._waiting:
            self.since = time.perf_counter_ns()
        self._waiting.setdefault(arrival.layer, deque()).append(arrival)

    def serve(self, most_rows: int) -> tuple[int, int, list[Arrival]]:
        """Launch one call of the layer that most rows wait for; who launches counts `in_flight`.

        Returns:
            The layer, the rows, and the arrivals that are complete once the call has ended.
        """
        layer = max(self._waiting, key=lambda layer: sum(arrival.left for arrival in self._waiting[layer]))
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
