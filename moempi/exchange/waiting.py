"""Which layer's rows an expert call takes, and whether it should wait for more: a decision about counts and times.

A call of few rows takes the host as long as any, and the GPU as long as reading the weights of the slots that it is
for; two calls take both twice. So it waits for the homes that have sent few rows of late, up to the time that a further
call would take: it is never late by more than that, and often saves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

FEW_ROWS = 128  # to a slot; with more of them a call computes longer than it reads
READ_RATE = 3e12  # bytes per second at which a GPU reads weights
CALL = 200_000  # ns that a call takes the host
LONGEST = 5_000_000  # ns after which rows are computed whatever else is there


class Held(NamedTuple):
    """What a rank holds of a layer."""

    slots: int
    nbytes: int  # of their weights; 0 where a call should never wait


@dataclass
class _Queue:
    """What waits for a layer."""

    came: int  # ns
    until: int  # ns, when it is not to wait any longer
    rows: int = 0
    homes: set[int] = field(default_factory=set)


class Waiting:
    """The layers that rows wait for.

    Args:
        held: by layer.
    """

    def __init__(self, held: Mapping[int, Held]):
        self._held = held
        self._queues: dict[int, _Queue] = {}  # the first to come first
        self._expected: dict[int, int] = {}  # homes whose last rows were few, and the layer that these were for

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, layer: int, home: int, rows: int, slots: int, now: int) -> None:
        """Rows of a home have come for so many slots of a layer, at a time in ns."""
        held = self._held[layer]
        if layer not in self._queues:
            cost = CALL + int(1e9 * held.nbytes * slots / (held.slots * READ_RATE)) if held.nbytes else 0
            self._queues[layer] = _Queue(now, now + cost)
        queue = self._queues[layer]
        queue.rows += rows
        queue.homes.add(home)
        self._expected.pop(home, None)
        if self._is_few(layer, rows):
            self._expected[home] = layer

    def choose(self, now: int) -> int | None:
        """The layer to be computed now, where any waits; None where its rows should wait for others."""
        first = next(iter(self._queues))
        if now - self._queues[first].came > LONGEST:
            return first
        fullest = max(self._queues, key=lambda layer: self._queues[layer].rows)
        if not self._is_few(fullest, self._queues[fullest].rows):
            return fullest
        return first if now >= self._queues[first].until or not self._missing(first) else None

    def take(self, layer: int, left: Mapping[int, int], now: int) -> None:
        """A layer is computed; `left`: rows by home that the call had no room for. Who did not come is not expected."""
        if now >= self._queues[layer].until:
            for home in self._missing(layer):
                del self._expected[home]
        queue = self._queues.pop(layer)
        if left:
            # Still the first to have come, and not to wait.
            kept = _Queue(queue.came, queue.came, sum(left.values()), set(left))
            self._queues = {layer: kept, **self._queues}

    def _missing(self, layer: int) -> set[int]:
        """Homes that are expected with rows for a layer: they have none here, and were not there with that one's."""
        expected = {home for home, last in self._expected.items() if last != layer}
        return expected.difference(*(queue.homes for queue in self._queues.values()))

    def _is_few(self, layer: int, rows: int) -> bool:
        return rows < FEW_ROWS * self._held[layer].slots
