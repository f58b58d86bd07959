"""Rows that wait for the experts of a GPU: a call takes what waits for a layer, whole arrivals at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from moempi.device.cuda_experts import Batch, Layer, slots_met
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


class Prepared(NamedTuple):
    """A call that is launched if the next one is of just these arrivals."""

    arrivals: list[Arrival]
    launch: Callable[[], None]


class CudaExperts(Experts):
    """The slots of this rank, layer by layer; `waiting` decides when a call takes which.

    Args:
        layers: the experts of every layer that the rank has slots of.
        memory: of messages, flat, in the model's dtype.

    Attributes:
        in_flight: calls that have been launched and not ended.
        calls_prepared: calls that were prepared before the last of their rows were here.
        news: whether anything came, or is on its way, since `prepare` was asked.
    """

    def __init__(self, layers: Mapping[int, Layer], memory: Tensor):
        super().__init__({})
        self._layers, self._memory = layers, memory
        self._arrivals: dict[int, deque[Arrival]] = {}  # by layer
        self._coming: dict[int, list[Arrival]] = {}  # by layer, whose rows are on their way
        self._prepared: Prepared | None = None
        self.news = False
        self.waiting = Waiting({n: call_cost(layer.slots, layer.nbytes) for n, layer in layers.items()})
        self.in_flight = self.calls_prepared = 0

    def __bool__(self) -> bool:
        if not self.waiting or self.in_flight >= CALLS_AHEAD:
            return False
        return self.waiting.choose(time.perf_counter_ns()) is not None

    @property
    def loaded(self) -> bool:
        """Whether any rows wait."""
        return bool(self.waiting)

    def announce(self, arrival: Arrival) -> None:
        """An arrival's rows are on their way, to where it says; `add` follows once they are here."""
        self._coming.setdefault(arrival.layer, []).append(arrival)
        self.news = True

    def add(self, arrival: Arrival) -> None:
        """Queue an arrival."""
        now = time.perf_counter_ns()
        coming = self._coming.setdefault(arrival.layer, [])
        if arrival in coming:
            coming.remove(arrival)
        self.news = True
        if not self.waiting:
            self.since = now
        self._arrivals.setdefault(arrival.layer, deque()).append(arrival)
        slots = slots_met(arrival.rows_per_slot)
        self.waiting.add(arrival.layer, arrival.source, arrival.left, slots, now)

    def prepare(self) -> bool:
        """Prepare the call of a layer whose last rows are on their way, if it is one of few rows; whether it did.

        The host has done its part of the call then before the last rows are here.
        """
        self.news = False
        for layer, coming in self._coming.items():
            if coming and self.waiting.is_whole_with(layer, coming):
                arrivals = [*self._arrivals[layer], *coming]
                if self._prepared and set(self._prepared.arrivals) == set(arrivals):
                    return False
                self._prepared = Prepared(arrivals, self._layers[layer].prepare(_batches(arrivals), self._memory))
                return True
        return False

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
        # Whatever is launched, the scratch is another call's from now on.
        prepared, self._prepared = self._prepared, None
        if prepared and set(prepared.arrivals) == set(taken):
            self.calls_prepared += 1
            prepared.launch()
        else:
            self.news = True
            self._layers[layer].prepare(_batches(taken), self._memory)()
        for arrival in taken:
            arrival.left = 0
        self.rows_computed += rows
        self.calls += 1
        return layer, rows, taken


def _batches(arrivals: list[Arrival]) -> list[Batch]:
    return [Batch(arrival.rows, arrival.answer, arrival.rows_per_slot) for arrival in arrivals]
