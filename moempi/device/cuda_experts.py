"""The experts of one layer on a GPU, all slots of the rank in one stack, computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moempi.device.cuda_graphs import Graphs
from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import Tiles, product_at, product_gathered, product_scattered, unit_of
from moempi.device.cuda_rows import put_words, row_tables, swiglu_at
from moempi.device.cuda_source import WORDS
from moempi.device.cuda_transfer import put
from moempi.device.product_tiles import TILES, tile_for
from moempi.model.expert import Expert
from moempi.planning.gpu_memory import room_of

# Operations per part, below which one launch for all is faster than cuBLAS part by part: its three calls take the host
# some 60 us, in which the GPU does this much, and a small product does not fill it.
WORTH_CALLS = 4e10
CALL_SHAPES = 64  # of recorded calls: numbers of batches and of rows, in which calls of decode differ


class Batch(NamedTuple):
    """Rows for the slots of a layer, slot behind slot, and where their outputs go; in the memory of messages."""

    rows: Rows  # [R, D]
    answer: Rows  # [R, D]
    rows_per_slot: tuple[int, ...]


class Part(NamedTuple):
    """Rows for one slot, [R, D] in and out."""

    slot: int
    rows: Rows
    answer: Rows


def slots_met(rows_per_slot: tuple[int, ...]) -> int:
    """How many slots get rows; a loop in Python would take some microseconds of every call."""
    return len(rows_per_slot) - rows_per_slot.count(0)


def parts_of(batches: Sequence[Batch]) -> list[Part]:
    """What is there for any slot, one by one."""
    parts = []
    for rows, answer, rows_per_slot in batches:
        lo = 0
        for slot, n in enumerate(rows_per_slot):
            if n:
                parts.append(Part(slot, rows.part(lo, lo + n), answer.part(lo, lo + n)))
                lo += n
    return parts


class Scratch:
    """What calls work with. They follow each other on one stream, so all layers share it.

    Args:
        rows: that there is to be memory for once the first call comes; it grows where one has more.

    Attributes:
        graphs: recordings of small calls.
    """

    def __init__(self, rows: int = 0) -> None:
        self._rows = rows
        self._memory: Tensor | None = None
        self._table: Tensor | None = None
        self.graphs = Graphs(CALL_SHAPES)

    def take(self, rows: int, width: int, like: Tensor) -> Tensor:
        """Flat memory of at least rows * width elements, of the dtype and on the device of another tensor.

        Args:
            width: elements for a row; the same in all layers.
        """
        if self._memory is None or self._memory.numel() < rows * width:
            self._memory = None
            # Enough at once: what is given back stays in the allocator's store, beside what comes after it.
            self._memory = torch.empty(max(rows, self._rows) * width, dtype=like.dtype, device=like.device)
        return self._memory

    def table(self, n: int, like: Tensor) -> Tensor:
        """Flat int64 memory of at least n elements, on the device of another tensor: which rows meet which weights."""
        if self._table is None or self._table.numel() < n:
            self._table = None
            self._table = torch.empty(2 * n, dtype=torch.int64, device=like.device)
        return self._table


class Stack:
    """Whole experts of one layer.

    Args:
        gate_up: [S, 2F, D].
        down: [S, D, F].
        exact: the bits of a row depend on that row alone.
        scratch: shared with the other layers of the rank.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, *, exact: bool, scratch: Scratch):
        self.gate_up, self.down, self.exact, self._scratch = gate_up, down, exact, scratch
        self.slots, self.nbytes = len(gate_up), gate_up.nbytes + down.nbytes
        self._gate_up, self._down = gate_up.unbind(), down.unbind()  # views made once
        self._gate_up_turned, self._down_turned = gate_up.mT.unbind(), down.mT.unbind()
        self._row_operations = 2 * (self._gate_up[0].numel() + self._down[0].numel())
        self._unit = unit_of(gate_up.shape[2], gate_up.dtype)

    def __call__(self, batches: Sequence[Batch], memory: Tensor) -> None:
        """Compute all batches. Rows and answers lie in `memory`, which is flat and in the model's dtype."""
        self.prepare(batches, memory)()

    def prepare(self, batches: Sequence[Batch], memory: Tensor) -> Callable[[], None]:
        """All of a call that can be done before its rows are there; what is returned launches the rest.

        Both on the same stream, and no other call of the scratch is prepared or made between them.
        """
        rows = sum(batch.rows.n for batch in batches)
        parts = sum(slots_met(batch.rows_per_slot) for batch in batches)
        fixed = self.exact or self._row_operations * rows < WORTH_CALLS * parts
        if fixed and parts > 1:
            return self._together(batches, memory, rows)
        return partial(self._one_by_one, batches, fixed=fixed)

    def _one_by_one(self, batches: Sequence[Batch], *, fixed: bool) -> None:
        for part in parts_of(batches):
            self._alone(part, fixed=fixed)

    def _alone(self, part: Part, *, fixed: bool) -> None:
        """One part. Fixed: the bits of `_together`, without its tables, by the same kernel; else by cuBLAS."""
        slot, rows, answer = part
        n, width, hidden = len(rows), self.gate_up.shape[1], self.gate_up.shape[1] // 2
        scratch = self._scratch.take(n, width + hidden, self.gate_up)
        gated = scratch.data_ptr()
        activated = gated + n * width * scratch.itemsize
        if fixed:
            product_at(rows.address, n, self._gate_up[slot], gated)
        else:
            torch.mm(rows.tensor(), self._gate_up_turned[slot], out=scratch[: n * width].view(n, width))
        swiglu_at(gated, n, hidden, scratch.dtype, activated)
        if fixed:
            product_at(activated, n, self._down[slot], answer.address)
        else:
            between = scratch[n * width : n * (width + hidden)].view(n, hidden)
            torch.mm(between, self._down_turned[slot], out=answer.tensor())

    def _together(self, batches: Sequence[Batch], memory: Tensor, rows: int) -> Callable[[], None]:
        """Put what is known of the batches on the GPU; the tables and products that are to be launched behind it."""
        n_slots, width, d = self.gate_up.shape
        unit, hidden, dtype = self._unit, width // 2, self.gate_up.dtype
        tile = tile_for(dtype, -(-rows // n_slots), d, n_slots)
        # Calls of few rows come again and again, and are recorded: in few shapes, with empty tiles and rows.
        recorded = rows <= TILES[dtype][0].rows * n_slots
        room = room_of(rows) if recorded else rows
        tiles = n_slots + room // tile.rows  # or fewer
        given: list[int] = []
        for rows_of, answer, rows_per_slot in batches:
            given += rows_of.begin // unit, answer.begin // unit, *rows_per_slot
        # The tables are made on the GPU, from what is known of the batches: the host would take longer than all else.
        sizes = [n + n % 2 for n in (len(given), 3 * tiles, room, room)]  # each table is aligned to 16 bytes
        table = self._scratch.table(sum(sizes), self.gate_up)
        scratch = self._scratch.take(room, width + hidden, self.gate_up)
        if len(given) <= WORDS:
            put_words(given, table)
        else:
            put(np.array(given, dtype=np.int64), table)

        def launch() -> None:
            at, of_tiles, inward, outward = (table.data_ptr() + 8 * sum(sizes[:i]) for i in range(4))
            row_tables(at, of_tiles, inward, outward, tiles, (len(batches), n_slots), tile.rows, d // unit)
            divided = Tiles(tile, tiles, of_tiles, unit)
            source, gated = memory.data_ptr(), scratch.data_ptr()
            activated = gated + room * width * dtype.itemsize
            product_gathered(source, self.gate_up, gated, divided, inward)
            swiglu_at(gated, room, hidden, dtype, activated)
            product_scattered(activated, self.down, source, divided, outward)

        if not recorded:
            return launch
        shape = tile, len(batches), room, table.data_ptr(), scratch.data_ptr(), memory.data_ptr()
        return partial(self._scratch.graphs.run, shape, self.gate_up.data_ptr(), launch)


class Pieces:
    """Experts of one layer that are summed leaf by leaf, or parts of experts, computed one after the other.

    Args:
        slots: by their number on this rank.
    """

    def __init__(self, slots: Mapping[int, Expert]):
        self._slots = slots
        self.slots, self.nbytes = len(slots), 0  # nothing waits for them

    def prepare(self, batches: Sequence[Batch], memory: Tensor) -> Callable[[], None]:
        """There is nothing to prepare; what is returned computes all batches into their answers."""
        return partial(self._compute, batches)

    def _compute(self, batches: Sequence[Batch]) -> None:
        for part in parts_of(batches):
            part.answer.tensor().copy_(self._slots[part.slot](part.rows.tensor()))


Layer = Stack | Pieces
