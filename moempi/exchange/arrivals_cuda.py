"""Rows that wait for the experts of a GPU: a call takes what waits for a layer, whole arrivals at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from moempi.device.cuda_experts import Layer, slots_met
from moempi.exchange.arrivals import Arrival, Experts
from moempi.exchange.waiting import CallCost, Waiting
from moempi.planning.gpu_memory import CALL_ROWS

FEW_ROWS = 128  # to a slot; with more of them a call computes longer than it reads
READ_RATE = 3e12  # bytes per second at which a GPU reads weights
CALL = 200_000  # ns that a call takes the host
CALLS_AHEAD = 2  # expert calls that the GPU has queued: one computes, the next one is there when it ends


def call_cost(slots: int, nbytes: int) -> CallCost:
    """What a call of so many slots takes; nbytes: of their weights, 0 where nothing should wait for them."""
    if not nbytes:
        return CallCost(0, 0, 0)
    return CallCost(CALL, int(1e9 * nbytes / slots / READ_RATE), FEW_ROWS * slots)


class CudaExperts(Experts):
    """The slots of this rank, layer by layer; `waiting` decides when a call takes which.

    Args:
        layers: the experts of every layer that the rank has slots of.
        memory: of messages, flat, in the model's dtype.

    Attributes:
        in_flight: calls that have been launched and not ended.
    """

    def __init__(self, layers: Mapping[int, Layer], memory: Tensor):
        super().__init__({})
        self._layers, self._memory = layers, memory
        self._arrivals: dict[int, deque[Arrival]] = {}  # by layer
        self.waiting = Waiting({n: call_cost(layer.slots, layer.nbytes) for n, layer in layers.items()})
        self.in_flight = 0

    def __bool__(self) -> bool:
        if not self.waiting or self.in_flight >= CALLS_AHEAD:
            return False
        return self.waiting.choose(time.perf_counter_ns()) is not None

    @property
    def loaded(self) -> bool:
        """Whether any rows wait."""
        return bool(self.waiting)

    def add(self, arrival: Arrival) -> None:
        """Queue an arrival."""
        now = time.perf_counter_ns()
        if not self.waiting:
            self.since = now
        self._arrivals.setdefault(arrival.layer, deque()).append(arrival)
        slots = slots_met(arrival, self._layers[arrival.layer].slots)
        self.waiting.add(arrival.layer, arrival.source, arrival.left, slots, now)

    def serve(self, most_rows: int) -> tuple[int, int, list[Arrival]]:
        """Launch one call of a layer; who launches counts `in_flight`.

        Returns:
            The layer, the rows, and the arrivals that are complete once the call has ended.
        """
        now = time.perf_counter_ns()
        layer = self.waiting.choose(now)
        assert layer is not None, "asked for while rows should wait"
        queue, rows = self._arrivals[layer], 0
        taken: list[Arrival] = []
        while queue and (not taken or rows + queue[0].left <= CALL_ROWS):
            taken.append(queue.popleft())
            rows += taken[-1].left
        left: dict[int, int] = {}
        for arrival in queue:
            left[arrival.source] = left.get(arrival.source, 0) + arrival.left
        self.waiting.take(layer, left, now)
        self._layers[layer](taken, self._memory)
        for arrival in taken:
            arrival.left = 0
        self.rows_computed += rows
        self.calls += 1
        return layer, rows, taken
