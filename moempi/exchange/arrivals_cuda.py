"""Rows that wait for the experts of a GPU: a call takes all that wait for a layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moempi.device.cuda_experts import Layer, Part
from moempi.exchange.arrivals import Arrival, Experts, _Section

CALLS_AHEAD = 2  # expert calls that the GPU has queued: one computes, the next one is there when it ends
MOST_ROWS = 65536  # of a call; bounds the memory of what lies between the two products


class CudaExperts(Experts):
    """The slots of this rank, layer by layer.

    Args:
        layers: the experts of every layer that the rank has slots of.
        memory: of messages, flat, in the model's dtype.
    """

    def __init__(self, layers: Mapping[int, Layer], memory: Tensor):
        super().__init__({})
        self._layers, self._memory = layers, memory
        self.in_flight = 0  # calls that have been launched and not ended

    def __bool__(self) -> bool:
        return bool(self._rows) and self.in_flight < CALLS_AHEAD

    def serve(self, most_rows: int) -> tuple[int, int, list[Arrival]]:
        """Launch one call of the layer that most rows wait for; who launches counts `in_flight`.

        Returns:
            The layer, the rows, and the arrivals that are complete once the call has ended.
        """
        waiting: dict[int, int] = {}
        for (layer, _), rows in self._rows.items():
            waiting[layer] = waiting.get(layer, 0) + rows
        layer = max(waiting, key=waiting.__getitem__)
        taken: list[tuple[int, _Section]] = []
        left = MOST_ROWS
        for key in [key for key in self._rows if key[0] == layer]:
            if left > 0:
                sections = self._take(key, left)
                left -= sum(section.hi - section.lo for section in sections)
                taken += [(key[1], section) for section in sections]
        return layer, MOST_ROWS - left, self._launch(layer, taken)

    def _launch(self, layer: int, taken: list[tuple[int, _Section]]) -> list[Arrival]:
        parts, finished = [], []
        for number, section in taken:
            arrival, lo, hi = section.arrival, section.lo, section.hi
            parts.append(Part(number, arrival.rows.part(lo, hi), arrival.answer.part(lo, hi)))
            arrival.left -= hi - lo
            if arrival.left == 0:
                finished.append(arrival)
            self.rows_computed += hi - lo
        self._layers[layer](parts, self._memory)
        self.calls += 1
        return finished
