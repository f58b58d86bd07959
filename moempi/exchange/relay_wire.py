"""Messages of relays as bytes. Frames say how long they are, so a message of many is one behind the other.

    parcel   64 bytes of int32: home, layer, microbatch, piece, node, R rows, P pairs, S slots
             slots int32 [S], counts int32 [S], row of each pair int32 [P], in fast mode weights float32 [P]
             rows [R, D] of the model's dtype
    return   64 bytes of int32: home, layer, microbatch, piece, node (where it comes from), rows
             rows [P, D] in the dtype that the layer is answered in; in fast mode [R, D] float32
    fan-out  64 bytes of int32: layer, microbatch, number of slots; counts int32 [slots of the receiver]
             rows in the order of its slots

Each of these lines begins at a multiple of 64 bytes, so that rows lie aligned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

ALIGNED = 64


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row on every part of the way.

    Args:
        sent: of a row on its way to a slot.
        answered: of an answer of a slot.
        fast: whether a node's answers come back as one float32 sum for each token.
    """

    sent: int
    answered: int
    fast: bool
    summed: int  # of a float32 sum


@dataclass(frozen=True)
class Name:
    """A parcel's name, which its return carries too."""

    home: int
    layer: int
    microbatch: int
    piece: int
    node: int  # that the slots are on


@dataclass(frozen=True)
class Frame:
    """A parcel as a relay sees it: views into the message that it came in."""

    name: Name
    slots: np.ndarray  # int32 [S]
    counts: np.ndarray  # int32 [S]
    row_of_pair: np.ndarray  # int32 [P]
    weights: np.ndarray | None  # float32 [P] in fast mode
    rows: np.ndarray  # uint8 [R * bytes of a row]
    n_rows: int


@dataclass(frozen=True)
class Returned:
    """A return as a relay sees it."""

    name: Name
    rows: np.ndarray  # uint8
    n_rows: int
    nbytes: int  # of the whole return


def aligned(nbytes: int) -> int:
    """Rounded up to the next multiple of 64."""
    return -(-nbytes // ALIGNED) * ALIGNED


def parcel_bytes(n_rows: int, n_pairs: int, n_slots: int, row: RowBytes) -> int:
    """Length of a parcel."""
    return ALIGNED + aligned(4 * (2 * n_slots + n_pairs * (2 if row.fast else 1))) + aligned(n_rows * row.sent)


def return_rows(n_rows: int, n_pairs: int, row: RowBytes) -> int:
    """Rows that come back for a parcel: one for every pair, in fast mode one for every token."""
    return n_rows if row.fast else n_pairs


def return_bytes(n_rows: int, n_pairs: int, row: RowBytes) -> int:
    """Length of the return of a parcel."""
    return ALIGNED + aligned(return_rows(n_rows, n_pairs, row) * (row.summed if row.fast else row.answered))


def fan_out_header(n_slots: int) -> int:
    """Bytes ahead of the rows of a fan-out to a rank with so many slots of the layer."""
    return ALIGNED + aligned(4 * n_slots)


# ---------------------------------------------------------------- parcels


def write_parcel(
    name: Name,
    slots: np.ndarray,
    counts: np.ndarray,
    row_of_pair: np.ndarray,
    weights: np.ndarray | None,
    rows: np.ndarray,
    row: RowBytes,
) -> np.ndarray:
    """A parcel, uint8.

    Args:
        weights: float32 [P] of the pairs, in fast mode.
        rows: uint8 [R * row.sent].
    """
    n_rows, n_pairs, n_slots = len(rows) // row.sent, len(row_of_pair), len(slots)
    frame = np.zeros(parcel_bytes(n_rows, n_pairs, n_slots, row), dtype=np.uint8)
    _put(frame, 0, np.array([*_numbers(name), n_rows, n_pairs, n_slots], dtype="<i4"))
    at = _put(frame, ALIGNED, slots.astype("<i4"))
    at = _put(frame, at, counts.astype("<i4"))
    at = _put(frame, at, row_of_pair.astype("<i4"))
    if weights is not None:
        at = _put(frame, at, weights.astype("<f4"))
    _put(frame, aligned(at), rows)
    return frame


def read_parcels(message: np.ndarray, row: RowBytes) -> Iterator[tuple[Frame, np.ndarray]]:
    """The parcels of a message, each with its own bytes; both are views."""
    at = 0
    while at < len(message):
        *numbers, n_rows, n_pairs, n_slots = message[at : at + 32].view("<i4").tolist()
        end = at + parcel_bytes(n_rows, n_pairs, n_slots, row)
        lengths = [n_slots, n_slots, n_pairs, n_pairs if row.fast else 0]
        ends = at + ALIGNED + 4 * np.cumsum([0, *lengths])
        slots, counts, row_of_pair, weights = (message[a:b] for a, b in pairwise(ends.tolist()))
        body = at + ALIGNED + aligned(4 * sum(lengths))
        frame = Frame(
            Name(*numbers),
            slots.view("<i4"),
            counts.view("<i4"),
            row_of_pair.view("<i4"),
            weights.view("<f4") if row.fast else None,
            message[body : body + n_rows * row.sent],
            n_rows,
        )
        yield frame, message[at:end]
        at = end


# ---------------------------------------------------------------- returns


def empty_return(name: Name, n_rows: int, row: RowBytes) -> tuple[np.ndarray, np.ndarray]:
    """A return of `n_rows` rows, and the part of it where they go: uint8, both."""
    width = row.summed if row.fast else row.answered
    frame = np.zeros(ALIGNED + aligned(n_rows * width), dtype=np.uint8)
    _put(frame, 0, np.array([*_numbers(name), n_rows], dtype="<i4"))
    return frame, frame[ALIGNED : ALIGNED + n_rows * width]


def read_returns(message: np.ndarray, width: Callable[[int], int]) -> Iterator[Returned]:
    """The returns of a message; their rows are views.

    Args:
        width: bytes of a returned row of a layer.
    """
    at = 0
    while at < len(message):
        *numbers, n_rows = message[at : at + 24].view("<i4").tolist()
        name = Name(*numbers)
        body, nbytes = at + ALIGNED, n_rows * width(name.layer)
        end = body + aligned(nbytes)
        yield Returned(name, message[body : body + nbytes], n_rows, end - at)
        at = end


# ---------------------------------------------------------------- fan-outs


def write_fan_out(layer: int, microbatch: int, counts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows (uint8) for the slots of one rank, `counts` int [slots of that rank] each."""
    header = fan_out_header(len(counts))
    frame = np.zeros(header + len(rows), dtype=np.uint8)
    _put(frame, 0, np.array([layer, microbatch, len(counts)], dtype="<i4"))
    _put(frame, ALIGNED, counts.astype("<i4"))
    _put(frame, header, rows)
    return frame


def read_fan_out(message: np.ndarray) -> tuple[int, int, tuple[int, ...], np.ndarray]:
    """(layer, microbatch, counts, rows uint8) of a fan-out."""
    layer, microbatch, n_slots = message[:12].view("<i4").tolist()
    counts = tuple(message[ALIGNED : ALIGNED + 4 * n_slots].view("<i4").tolist())
    return layer, microbatch, counts, message[fan_out_header(n_slots) :]


def _numbers(name: Name) -> tuple[int, int, int, int, int]:
    return name.home, name.layer, name.microbatch, name.piece, name.node


def _put(frame: np.ndarray, at: int, values: np.ndarray) -> int:
    """Write values; where they end."""
    end = at + values.nbytes
    frame[at:end] = values.view(np.uint8)
    return end
