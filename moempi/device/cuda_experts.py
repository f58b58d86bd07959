"""The experts of one layer on a GPU, all slots of the rank in one stack, computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moempi.device.cuda_graphs import Graphs
from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import Tiles, product_at, product_gathered, product_scattered, unit_of
from moempi.device.cuda_rows import row_tables, swiglu_at
from moempi.device.cuda_source_routes import WORDS
from moempi.device.cuda_transfer import put
from moempi.device.product_tiles import TILES, tile_for, with_room
from moempi.model.expert import Expert
from moempi.planning.gpu_memory import room_of, usual_rows

# Operations per part, below which one launch for all is faster than cuBLAS part by part: its three calls take the host
# some 60 us, in which the GPU does this much, and a small product does not fill it.
WORTH_CALLS = 4e10
CALL_SHAPES = 64  # of recorded calls: numbers of rows, in which calls of decode differ


class Batch(Protocol):
    """Rows for the slots of a layer, slot behind slot, and where their outputs go; in the memory of messages."""

    rows: Rows  # [R, D]
    answer: Rows  # [R, D]
    rows_per_slot: tuple[int, ...]  # empty where the host does not know it
    counts: int  # address of the same on the GPU, int32 [S], where it is there; else 0


class Part(NamedTuple):
    """Rows for one slot, [R, D] in and out."""

    slot: int
    rows: Rows
    answer: Rows


def slots_met(batch: Batch, n_slots: int) -> int:
    """How many of the slots get rows; at most, where the host does not know. A loop would take microseconds."""
    per_slot = batch.rows_per_slot
    return len(per_slot) - per_slot.count(0) if per_slot else min(n_slots, batch.rows.n)


def parts_of(batches: Sequence[Batch]) -> list[Part]:
    """What is there for any slot, one by one; the host knows their rows for every slot."""
    parts = []
    for batch in batches:
        lo = 0
        for slot, n in enumerate(batch.rows_per_slot):
            if n:
                parts.append(Part(slot, batch.rows.part(lo, lo + n), batch.answer.part(lo, lo + n)))
                lo += n
    return parts


class Scratch:
    """What calls work with. They follow each other on one stream, so all layers share it.

    Args:
        rows: that there is to be memory for once the first call comes; it grows where one has more.

    Attributes:
        graphs: recordings of small calls.
        version: of its memory; another one lies elsewhere.
    """

    def __init__(self, rows: int = 0) -> None:
        self._rows = rows
        self._memory: Tensor | None = None
        self._table: Tensor | None = None
        self.version = 0
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
            self.version += 1
        return self._memory

    def table(self, n: int, like: Tensor) -> Tensor:
        """Flat int64 memory of at least n elements, on the device of another tensor: which rows meet which weights."""
        if self._table is None or self._table.numel() < n:
            self._table = None
            self._table = torch.empty(2 * n, dtype=torch.int64, device=like.device)
            self.version += 1
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
        # Calls of few rows come again and again: in few shapes, with empty tiles and rows.
        self._few = TILES[gate_up.dtype][0].rows * self.slots
        self._calls: dict[tuple[int, int, int], _Call] = {}
        self._version = 0  # of the scratch that these work with

    def __call__(self, batches: Sequence[Batch], memory: Tensor) -> None:
        """Compute all batches. Rows and answers lie in `memory`, which is flat and in the model's dtype."""
        rows, parts, unknown = 0, 0, False
        for batch in batches:
            rows += batch.rows.n
            parts += slots_met(batch, self.slots)
            unknown = unknown or not batch.rows_per_slot
        fixed = unknown or self.exact or self._row_operations * rows < WORTH_CALLS * parts
        if unknown or (fixed and parts > 1):
            self._together(batches, memory, rows)
        else:
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

    def _together(self, batches: Sequence[Batch], memory: Tensor, rows: int) -> None:
        if rows > self._few:
            large = self._call_for(len(batches), rows, rows, memory)
            self._make_tables(batches, large)
            large.launch()
            return
        room = room_of(rows)
        key = len(batches), room, memory.data_ptr()
        if self._version != self._scratch.version:
            self._calls.clear()
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._call_for(len(batches), room, usual_rows(room), memory)
            self._version = self._scratch.version
        self._make_tables(batches, call)
        # What is recorded depends on where things lie, not on how many batches there are.
        self._scratch.graphs.run((room, self._version, key[2]), self.gate_up.data_ptr(), call.launch)

    def _call_for(self, n_batches: int, room: int, rows: int, memory: Tensor) -> _Call:
        """A call of so many batches, with room for so many rows, of about so many."""
        n_slots, width, d = self.gate_up.shape
        unit, hidden, dtype = self._unit, width // 2, self.gate_up.dtype
        of_slot = -(-rows // n_slots)
        tile = tile_for(dtype, of_slot, d, n_slots)
        tiles = n_slots + room // tile.rows  # or fewer
        sizes = [n + n % 2 for n in (3 * tiles, room, room)]  # each table is aligned to 16 bytes
        table = self._scratch.table(sum(sizes) + n_batches * (3 + n_slots), self.gate_up)
        scratch = self._scratch.take(room, width + hidden, self.gate_up)
        of_tiles, inward, outward = (table.data_ptr() + 8 * sum(sizes[:i]) for i in range(3))
        filled = n_slots * -(-of_slot // tile.rows)  # about
        up, back = (
            Tiles(with_room(tile, filled * -(-outputs // tile.outputs)), tiles, of_tiles, unit)
            for outputs in (width, d)
        )
        source, gated = memory.data_ptr(), scratch.data_ptr()
        activated = gated + room * width * dtype.itemsize

        def launch() -> None:
            product_gathered(source, self.gate_up, gated, up, inward)
            swiglu_at(gated, room, hidden, dtype, activated)
            product_scattered(activated, self.down, source, back, outward)

        tables = of_tiles, inward, outward, tiles, (n_batches, n_slots), tile.rows, d // unit
        return _Call(table[sum(sizes) :], tables, launch)

    def _make_tables(self, batches: Sequence[Batch], call: _Call) -> None:
        """On the GPU, from what is known of the batches: the host would take longer than all else."""
        unit, n_slots, told, more = self._unit, self.slots, list[int](), call.more
        known = [batch.rows_per_slot for batch in batches if not batch.counts] if n_slots > 1 else []
        counts = 0
        if known:
            there = more[3 * len(batches) :]
            put(np.array(known, dtype=np.int32).reshape(-1), there.view(torch.int32))
            counts = there.data_ptr()
        for batch in batches:
            told += batch.rows.begin // unit, batch.answer.begin // unit
            if n_slots == 1:
                told.append(batch.rows.n)
            elif batch.counts:
                told.append(batch.counts)
            else:
                told.append(counts)
                counts += 4 * n_slots
        if len(told) <= WORDS:
            row_tables(told, *call.tables)
        else:
            put(np.array(told, dtype=np.int64), more)
            row_tables(more.data_ptr(), *call.tables)


class _Call(NamedTuple):
    """All of a call that depends on its shape alone."""

    more: Tensor  # flat int64 memory for what does not go along with a launch
    tables: tuple[int, int, int, int, tuple[int, int], int, int]  # what `row_tables` is told beside the batches
    launch: Callable[[], None]  # of the products


class Pieces:
    """Experts of one layer that are summed leaf by leaf, or parts of experts, computed one after the other.

    Args:
        slots: by their number on this rank.
    """

    def __init__(self, slots: Mapping[int, Expert]):
        self._slots = slots
        self.slots, self.nbytes = len(slots), 0  # nothing waits for them

    def __call__(self, batches: Sequence[Batch], memory: Tensor) -> None:
        """Compute all batches into their answers."""
        for part in parts_of(batches):
            part.answer.tensor().copy_(self._slots[part.slot](part.rows.tensor()))


Layer = Stack | Pieces
