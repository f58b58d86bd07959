"""What goes where: pure integers. One message per destination rank that gets any rows, and none otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moempi.exchange.slots import LayerTable


class Message(NamedTuple):
    """Rows [lo, hi) of a dispatch, which go to one rank (or a piece of them)."""

    destination: int
    lo: int
    hi: int
    rows_per_slot: tuple[int, ...]  # for every slot that the destination holds of the layer
    piece: int = 0


@dataclass(frozen=True)
class DispatchPlan:
    """Where the rows of one microbatch in one layer go, and where they come back to.

    A *pair* is (token, k), numbered t * K + k.
    """

    pairs: np.ndarray  # [R] int64 pair of every row, by destination, slot, pair
    messages: tuple[Message, ...]  # ascending destinations
    slot_begin: np.ndarray  # [S + 1] rows of slot s are slot_begin[s]:slot_begin[s + 1]
    n_pairs: int

    def places(self) -> np.ndarray:
        """int64 [T * K]: the row of every pair, where each has one."""
        places = np.empty(self.n_pairs, dtype=np.int64)
        places[self.pairs] = np.arange(self.n_pairs)
        return places


def plan_dispatch(covers: np.ndarray, table: LayerTable) -> DispatchPlan:
    """Sort the pairs of a microbatch by slot.

    Args:
        covers: [T, K] from `LayerTable.choose_covers`.
    """
    flat = covers.ravel()
    by_cover = np.argsort(flat, kind="stable")
    counts = np.bincount(flat, minlength=len(table.covers))
    if table.cut:
        by_slot, slot_counts = _repeat_for_slots(by_cover, counts, table)
    else:
        by_slot, slot_counts = by_cover, counts
    slot_begin = np.zeros(len(slot_counts) + 1, dtype=np.int64)
    slot_counts.cumsum(out=slot_begin[1:])
    return DispatchPlan(by_slot, plan_messages(slot_counts, table), slot_begin, len(flat))


def plan_messages(slot_counts: np.ndarray, table: LayerTable, header_rows: int = 0) -> tuple[Message, ...]:
    """The messages, where slot s gets slot_counts[s] rows.

    Args:
        header_rows: so many lie ahead of those for each rank that holds slots, and belong to no message.
    """
    per_slot, begin, messages, lo = slot_counts.tolist(), table.rank_begins, [], 0
    for rank in range(table.n_ranks):
        rows = per_slot[begin[rank] : begin[rank + 1]]
        lo += header_rows if rows else 0
        hi = lo + sum(rows)
        if hi > lo:
            messages.append(Message(rank, lo, hi, tuple(rows)))
            lo = hi
    return tuple(messages)


def _repeat_for_slots(by_cover: np.ndarray, counts: np.ndarray, table: LayerTable) -> tuple[np.ndarray, np.ndarray]:
    begin = np.concatenate([[0], np.cumsum(counts)])
    cover_of_slot = np.zeros(len(table.rank), dtype=np.int64)
    for cover, slots in enumerate(table.covers):
        cover_of_slot[list(slots)] = cover
    rows = [by_cover[begin[c] : begin[c + 1]] for c in cover_of_slot]
    return np.concatenate(rows), counts[cover_of_slot]


def cut_into_pieces(message: Message, most_rows: int) -> Iterator[Message]:
    """A message as pieces of at most `most_rows` rows; pieces are numbered and carry their own rows per slot."""
    if message.hi - message.lo <= most_rows:
        yield message
        return
    ends = np.cumsum(message.rows_per_slot)
    starts = ends - message.rows_per_slot
    for piece, lo in enumerate(range(0, message.hi - message.lo, most_rows)):
        hi = min(lo + most_rows, message.hi - message.lo)
        rows = np.clip(np.minimum(ends, hi) - np.maximum(starts, lo), 0, None)
        yield Message(message.destination, message.lo + lo, message.lo + hi, tuple(rows.tolist()), piece)


def header_bytes(n_slots: int) -> int:
    """Bytes ahead of the rows: none where the receiver holds one slot of the layer, else a count per slot.

    Rounded up to 64, so that the rows behind stay aligned.
    """
    return 0 if n_slots == 1 else -(-4 * n_slots // 64) * 64


def header_places(table: LayerTable, header_rows: int) -> np.ndarray:
    """What lies ahead of the rows of every slot, where each rank's rows are packed behind a header (of whole experts).

    Args:
        header_rows: that the header of a rank takes, at whose end it lies.

    Returns:
        int32 [S, 3]: the first slot of its rank, rows that headers take up to that rank's own, bytes of that one.
    """
    holders = np.unique(table.rank, return_inverse=True)[1]
    nbytes = [header_bytes(table.slots_on(rank)) for rank in range(table.n_ranks)]
    of_slot = table.rank_begin[table.rank], header_rows * (holders + 1), np.array(nbytes)[table.rank]
    return np.stack(of_slot, axis=1).astype(np.int32)


@dataclass(frozen=True)
class Tags:
    """Tags name layer, microbatch and piece.

    Args:
        n_microbatches: microbatches per rank.
        n_pieces: most pieces that a message is cut into.
    """

    n_microbatches: int
    n_pieces: int

    def of(self, layer: int, microbatch: int, piece: int) -> int:
        """The tag of a dispatch and of its answer."""
        return (layer * self.n_microbatches + microbatch) * self.n_pieces + piece

    def layer(self, tag: int) -> int:
        """The layer that a tag names."""
        return tag // (self.n_microbatches * self.n_pieces)

    def microbatch(self, tag: int) -> int:
        """The microbatch that a tag names."""
        return tag // self.n_pieces % self.n_microbatches

    def bound(self, n_layers: int) -> int:
        """The largest tag of a model; MPI.TAG_UB must not be smaller."""
        return n_layers * self.n_microbatches * self.n_pieces - 1


def message_pieces(most_rows: int, row_bytes: int, piece_bytes: int) -> tuple[int, int]:
    """(pieces of the largest message, rows per piece) where a message has at most `most_rows` rows."""
    rows = max(1, piece_bytes // row_bytes)
    return max(1, -(-most_rows // rows)), rows
