"""Arrivals: batches of rows that have come to the slots of this rank, and the experts that compute them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from moempi.device.cpu_rows import SmallExpert, run_experts
from moempi.exchange.tasks import Future
from moempi.exchange.waiting import CallCost, Waiting
from moempi.model.expert import Expert

FEW_ROWS = 8  # to a slot whose weights no cache holds; with more of them a call computes longer than it reads
READ_RATE = 15e9  # bytes per second at which a thread reads them

SlotKey = tuple[int, int]  # (layer, number of the slot on this rank)


@dataclass(eq=False)
class Arrival:
    """Rows of one dispatch at this rank. `answer` has the same order; it goes back when `left` is 0."""

    source: int
    tag: int
    layer: int
    microbatch: int
    rows: Any  # [R, D]: a tensor; on a GPU `moempi.device.cuda_memory.Rows`
    answer: Any  # [R, D] the same, in the dtype that the layer is answered in
    rows_per_slot: tuple[int, ...]  # empty where `counts` says it to a GPU alone
    left: int  # rows not computed yet
    done: Future | None = None  # set for local rows, whose answer is the home's own memory
    charged: int = 0  # bytes of the arrival budget that it holds
    block: int = 0  # of the memory of messages on a GPU that it holds
    counts: int = 0  # address on a GPU where its rows per slot lie, in a header; 0 where they do not
    reply: Callable[[np.ndarray], MPI.Request] | None = None  # sends its answer, where it came from a relay
    age: int = 0  # the least is served first


@dataclass
class _Section:
    """Rows [lo, hi) of an arrival, for one slot."""

    arrival: Arrival
    lo: int
    hi: int


def call_costs(slots: Mapping[SlotKey, Expert], threads: int) -> dict[int, CallCost]:
    """What calls take, of the layers whose experts no cache holds; the others never wait."""
    nbytes: dict[int, list[int]] = {}
    for (layer, _), expert in slots.items():
        if expert.nbytes:
            nbytes.setdefault(layer, []).append(expert.nbytes)
    rate = READ_RATE * threads
    return {layer: CallCost(0, int(1e9 * max(of) / rate), FEW_ROWS * len(of)) for layer, of in nbytes.items()}


class Experts:
    """The slots of this rank, each with the rows that are here for it.

    A layer's rows are open to be computed at once where its experts are small; else `waiting` decides when they are.

    Args:
        slots: the expert, or part of one, that each slot holds.
        threads: that share a product.
    """

    def __init__(self, slots: Mapping[SlotKey, Expert], threads: int = 1):
        self._slots = slots
        self._queues: dict[SlotKey, deque[_Section]] = {}
        self._rows: dict[SlotKey, int] = {}  # rows here, only of slots that have any
        self._ages: dict[tuple[int, int], int] = {}  # of those to come for a (layer, microbatch)
        self._came = 0
        self._costs = call_costs(slots, threads)
        self._open: set[int] = set()  # layers whose rows do not wait, any more or ever
        self.waiting = Waiting(self._costs)
        self.since = 0  # when the first of the rows came that wait, or waited last (ns of time.perf_counter_ns())
        self.calls = 0
        self.rows_computed = 0

    def __bool__(self) -> bool:
        """Whether there is a call to be made now."""
        return bool(self._open) or (bool(self.waiting) and self.waiting.choose(time.perf_counter_ns()) is not None)

    @property
    def loaded(self) -> bool:
        """Whether any rows are here."""
        return bool(self._rows)

    def add(self, arrival: Arrival) -> None:
        """Queue an arrival's rows at their slots."""
        now = time.perf_counter_ns()
        if not self._rows:
            self.since = now
        layer = arrival.layer
        if layer not in self._costs:
            self._open.add(layer)
        elif layer in self._open:
            self.waiting.note(layer, arrival.source, arrival.left)
        else:
            slots = sum(map(bool, arrival.rows_per_slot))
            self.waiting.add(layer, arrival.source, arrival.left, slots, now)
        self._came += 1
        arrival.age = self._ages.setdefault((layer, arrival.microbatch), self._came)
        lo = 0
        for number, rows in enumerate(arrival.rows_per_slot):
            if rows:
                key = (layer, number)
                self._queues.setdefault(key, deque()).append(_Section(arrival, lo, lo + rows))
                self._rows[key] = self._rows.get(key, 0) + rows
                lo += rows

    def serve(self, most_rows: int) -> tuple[int, int, list[Arrival]]:
        """One call of an expert; small ones of its layer go together.

        Whose rows came first is served first, so that one microbatch computes while another attends. All homes' ones of
        a number are one, until the first of them is complete. Of its experts it is the one that most rows wait for.

        Returns:
            Its layer, the rows computed, and the arrivals that are complete with them.
        """
        now = time.perf_counter_ns()
        while self.waiting and (layer := self.waiting.choose(now)) is not None:
            self.waiting.take(layer, {}, now)
            self._open.add(layer)
        key = min((key for key in self._rows if key[0] in self._open), key=self._turn)
        small = self._slots[key].small
        taken = self._compute(key, most_rows) if small is None else self._compute_layer(key[0], most_rows, small)
        finished, rows = [], 0
        for section in taken:
            n = section.hi - section.lo
            section.arrival.left -= n
            rows += n
            if section.arrival.left == 0:
                finished.append(section.arrival)
                self._ages.pop((key[0], section.arrival.microbatch), None)
        self.rows_computed += rows
        if not any(layer == key[0] for layer, _ in self._rows):
            self._open.remove(key[0])
        return key[0], rows, finished

    def _turn(self, key: SlotKey) -> tuple[int, int]:
        return self._queues[key][0].arrival.age, -self._rows[key]

    def _compute(self, key: SlotKey, most_rows: int) -> list[_Section]:
        """All arrivals of a slot as one product."""
        taken = self._take(key, most_rows)
        inputs = [section.arrival.rows[section.lo : section.hi] for section in taken]
        outputs, at = self._slots[key](inputs[0] if len(inputs) == 1 else torch.cat(inputs)), 0
        for section in taken:
            n = section.hi - section.lo
            section.arrival.answer[section.lo : section.hi] = outputs[at : at + n]
            at += n
        self.calls += 1
        return taken

    def _compute_layer(self, layer: int, most_rows: int, shape: SmallExpert) -> list[_Section]:
        """What waits for any slot of a layer, by one kernel that reads and writes rows where they lie."""
        taken: list[_Section] = []
        batches: list[list[int]] = []
        for key in [key for key in self._rows if key[0] == layer]:
            if most_rows <= 0:
                break
            expert = self._slots[key].small
            assert expert is not None, "the experts of a layer are of one shape"
            for section in self._take(key, most_rows):
                arrival, n = section.arrival, section.hi - section.lo
                rows = arrival.rows.data_ptr() + section.lo * arrival.rows.stride(0) * arrival.rows.itemsize
                answer = arrival.answer.data_ptr() + section.lo * arrival.answer.stride(0) * arrival.answer.itemsize
                batches.append([rows, answer, n, *expert.weights])
                taken.append(section)
                most_rows -= n
            self.calls += 1
        arrival = taken[0].arrival
        run_experts(batches, shape, arrival.rows.dtype, arrival.answer.dtype)
        return taken

    def _take(self, key: SlotKey, most_rows: int) -> list[_Section]:
        queue, taken, rows = self._queues[key], [], 0
        while queue and rows < most_rows:
            section = queue.popleft()
            n = min(section.hi - section.lo, most_rows - rows)
            taken.append(_Section(section.arrival, section.lo, section.lo + n))
            if section.lo + n < section.hi:
                queue.appendleft(_Section(section.arrival, section.lo + n, section.hi))
            rows += n
        if queue:
            self._rows[key] -= rows
        else:
            del self._rows[key]
        return taken
