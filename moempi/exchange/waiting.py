"""Which layer's rows an expert call takes, and whether it should wait for more: a decision about counts and times.

A call of few rows takes as long as reading the weights of the slots that it is for, and on a GPU the host as long as
any; two calls take both twice. So it waits for the homes that have sent few rows of late, up to the time that a further
call would take: it is never late by more than that, and often saves it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

LONGEST = 5_000_000  # ns after which a layer's rows wait no longer, whatever else is there


class CallCost(NamedTuple):
    """What a call of a layer's slots takes."""

    call: int  # ns that it takes for any
    slot: int  # ns more for each that it is for
    few: int  # rows, below which it takes no longer than this; 0 where it should never wait


@dataclass
class _Queue:
    """What waits for a layer."""

    came: int  # ns
    until: int  # ns, when it is not to wait any longer
    rows: int = 0
    homes: set[int] = field(default_factory=set)


class Waiting:
    """The layers that rows wait for. Where relays bring rows, a home stands here for the relay that they came from.

    Args:
        costs: by layer.
    """

    def __init__(self, costs: Mapping[int, CallCost]):
        self._costs = costs
        self._places = {layer: place for place, layer in enumerate(sorted(costs))}
        self._queues: dict[int, _Queue] = {}  # the first to come first
        self._expected: dict[int, int] = {}  # homes whose last rows were few, and the layer that these were for
        self._chosen: int | None = None
        self._holds_until = 0  # ns, up to which `_chosen` holds while nothing comes and nothing is taken

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, layer: int, home: int, rows: int, slots: int, now: int) -> None:
        """Rows of a home have come for so many slots of a layer, at a time in ns."""
        cost = self._costs[layer]
        if layer not in self._queues:
            self._queues[layer] = _Queue(now, now + cost.call + cost.slot * slots)
        queue = self._queues[layer]
        queue.rows += rows
        queue.homes.add(home)
        self.note(layer, home, rows)

    def note(self, layer: int, home: int, rows: int) -> None:
        """Rows of a home have come for a layer, whether they wait or not: it is expected again if they are few."""
        self._holds_until = 0
        self._expected.pop(home, None)
        if rows < self._costs[layer].few:
            self._expected[home] = layer

    @property
    def due(self) -> int:
        """When the first of those that wait does so no longer, in ns; only where any waits."""
        return min(queue.until for queue in self._queues.values())

    def hurry(self) -> None:
        """What waits is not to wait any longer: it stands in the way of what it waits for."""
        self._holds_until = 0
        for queue in self._queues.values():
            queue.until = queue.came

    def choose(self, now: int) -> int | None:
        """The layer to be computed now, where any waits; None where its rows should wait for others."""
        # Asked for in every turn, and nearly always as before.
        if now >= self._holds_until:
            self._chosen = self._choose(now)
            late = next(iter(self._queues.values())).came + LONGEST + 1
            changes = min(self.due, late) if self._chosen is None else late
            self._holds_until = changes if changes > now else sys.maxsize
        return self._chosen

    def _choose(self, now: int) -> int | None:
        first = next(iter(self._queues))
        if now - self._queues[first].came > LONGEST:
            return first
        full = [layer for layer, queue in self._queues.items() if queue.rows >= self._costs[layer].few]
        if full:
            return max(full, key=lambda layer: self._queues[layer].rows)
        missing = set[int]()
        for layer, queue in self._queues.items():
            homes = () if now >= queue.until else self._missing(layer)
            if not homes:
                return layer
            missing.update(homes)
        # Where each waits for one that waits here as well, in a circle, nobody comes before something is computed.
        here = set[int]().union(*(queue.homes for queue in self._queues.values()))
        return first if missing <= here else None

    def take(self, layer: int, left: Mapping[int, int], now: int) -> None:
        """A layer is computed; `left`: rows by home that the call had no room for. Who did not come is not expected."""
        self._holds_until = 0
        if now >= self._queues[layer].until:
            for home in self._missing(layer):
                del self._expected[home]
        queue = self._queues.pop(layer)
        if left:
            # Still the first to have come, and not to wait.
            kept = _Queue(queue.came, queue.came, sum(left.values()), set(left))
            self._queues = {layer: kept, **self._queues}

    def _missing(self, layer: int) -> set[int]:
        """Homes that are expected with rows for a layer and have none here: those that are behind it.

        Of two homes at different layers the nearer way round says which is behind. Were neither waited for, they
        would stay apart, and every layer be computed for each of them alone.
        """
        place, layers, here = self._places[layer], len(self._places), self._queues[layer].homes
        return {
            home
            for home, last in self._expected.items()
            if home not in here and 0 < (place - self._places[last]) % layers <= layers // 2
        }
