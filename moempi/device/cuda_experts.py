"""The experts of one layer on a GPU, all slots of the rank in one stack, computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device.cuda_graphs import Graphs
from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import product_at, product_by_tiles, tile_for, unit_of
from moempi.device.cuda_rows import put_words, swiglu, swiglu_at, tile_tables
from moempi.device.cuda_source import WORDS
from moempi.device.cuda_transfer import put
from moempi.model.expert import Expert

# Operations per slot, below which one launch for all slots is faster than cuBLAS slot by slot: its three calls take the
# host some 60 us, in which the GPU does this much, and a small product does not fill it.
WORTH_CALLS = 2e10
ROUND = 16  # tiles to a multiple of which a recorded call is filled up
ROUND_ROWS = 256  # rows likewise, which lie between the products
CALL_SHAPES = 64  # of recorded calls: numbers of homes, of tiles and of rows, in which calls of decode differ
FEW = 3  # parts that are launched one after the other, which takes less of the host than a table of them


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

    Attributes:
        graphs: recordings of small calls.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._table: Tensor | None = None
        self.graphs = Graphs(CALL_SHAPES)

    def take(self, n: int, like: Tensor) -> Tensor:
        """Flat memory of at least n elements, of the dtype and on the device of another tensor: between products."""
        if self._memory is None or self._memory.numel() < n:
            self._memory = torch.empty(n, dtype=like.dtype, device=like.device)
        return self._memory

    def table(self, n: int, like: Tensor) -> Tensor:
        """Flat int64 memory of at least n elements, on the device of another tensor: which rows meet which weights."""
        if self._table is None or self._table.numel() < n:
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
        self._down_turned = [weight.T for weight in self._down]
        self._row_operations = 2 * (self._gate_up[0].numel() + self._down[0].numel())
        width, d = gate_up.shape[1:]
        self._units = tuple(unit_of(n, gate_up.dtype) for n in (d, width, width // 2))

    def __call__(self, batches: Sequence[Batch], memory: Tensor) -> None:
        """Compute all batches. Rows and answers lie in `memory`, which is flat and in the model's dtype."""
        counts = [n for batch in batches for n in batch.rows_per_slot if n]
        fixed = self.exact or self._row_operations * sum(counts) < WORTH_CALLS * len(counts)
        if fixed and len(counts) > FEW:
            self._together(batches, memory, counts)
            return
        for part in parts_of(batches):
            if fixed:
                self._fixed(part)
            else:
                hidden = swiglu(F.linear(part.rows.tensor(), self._gate_up[part.slot]))
                torch.mm(hidden, self._down_turned[part.slot], out=part.answer.tensor())

    def _fixed(self, part: Part) -> None:
        """The bits of `_together`, without its tables: the same kernel."""
        gate_up, down, n = self._gate_up[part.slot], self._down[part.slot], len(part.rows)
        width = gate_up.shape[0]
        scratch = self._scratch.take(n * (width + width // 2), gate_up)
        gated = scratch.data_ptr()
        hidden = gated + n * width * gate_up.itemsize
        product_at(part.rows.address, n, gate_up, gated)
        swiglu_at(gated, n, width // 2, gate_up.dtype, hidden)
        product_at(hidden, n, down, part.answer.address)

    def _together(self, batches: Sequence[Batch], memory: Tensor, counts: list[int]) -> None:
        n_slots, width, d = self.gate_up.shape
        hidden, dtype = width // 2, self.gate_up.dtype
        in_d, in_width, in_hidden = self._units
        given: list[int] = []
        for rows_of, answer, rows_per_slot in batches:
            given += rows_of.begin // in_d, answer.begin // in_d, *rows_per_slot
        rows, most = sum(counts), max(counts)
        tile = tile_for(dtype, most)
        tiles = sum(-(-n // tile.rows) for n in counts)
        # Calls of few rows come again and again, and are recorded: in few shapes, with empty tiles and rows.
        small = most <= tile.rows
        if small:
            tiles, rows = -(-tiles // ROUND) * ROUND, -(-rows // ROUND_ROWS) * ROUND_ROWS
        # The tables are made on the GPU, from what is known of the batches: the host would take longer than all else.
        sizes = len(given), len(batches) * n_slots + 1, 4 * tiles, 4 * tiles
        table = self._scratch.table(sum(sizes), self.gate_up)
        scratch = self._scratch.take(rows * (width + hidden), self.gate_up)
        if len(given) <= WORDS:
            put_words(given, table.data_ptr())
        else:
            put(np.array(given, dtype=np.int64), table)

        def launch() -> None:
            at, between, inward, outward = (table.data_ptr() + 8 * sum(sizes[:i]) for i in range(4))
            steps = d // in_d, width // in_width, hidden // in_hidden
            tile_tables(at, between, inward, outward, tiles, (len(batches), n_slots), tile.rows, steps)
            gated, source = scratch.data_ptr(), memory.data_ptr()
            activated = gated + rows * width * dtype.itemsize
            product_by_tiles(source, self.gate_up, gated, inward, tiles, tile, (in_d, in_width))
            swiglu_at(gated, rows, hidden, dtype, activated)
            product_by_tiles(activated, self.down, source, outward, tiles, tile, (in_hidden, in_d))

        if small:
            shape = tile, len(batches), tiles, rows, table.data_ptr(), scratch.data_ptr(), memory.data_ptr()
            self._scratch.graphs.run(shape, self.gate_up.data_ptr(), launch)
        else:
            launch()


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
