"""The memory of messages on a GPU: allocated once, divided by hand, never torch's to use again.

A block that torch's allocator takes back is reused in the order of a stream; MPI writes into it now. So nothing that
torch allocates is given to MPI. A block here goes back when the last kernel that uses it has ended and its requests
are complete; who holds it sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moempi.device.arena import Arena, aligned


class Rows:
    """Rows [R, D] somewhere in a flat memory: four numbers, and a tensor only where torch is to compute.

    Args:
        memory: flat, from the begin of its storage.
        begin: of the rows, in elements.
    """

    __slots__ = ("begin", "d", "memory", "n")

    def __init__(self, memory: Tensor, begin: int, n: int, d: int):
        self.memory, self.begin, self.n, self.d = memory, begin, n, d

    @classmethod
    def of(cls, tensor: Tensor) -> Rows:
        """The rows of a contiguous tensor [R, D] that begins with its storage."""
        return cls(tensor.view(-1), 0, *tensor.shape)

    def __len__(self) -> int:
        return self.n

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.n * self.d * self.memory.itemsize

    @property
    def offset(self) -> int:
        """Bytes before the rows in their memory."""
        return self.begin * self.memory.itemsize

    @property
    def address(self) -> int:
        """On the GPU."""
        return self.memory.data_ptr() + self.begin * self.memory.itemsize

    def part(self, lo: int, hi: int) -> Rows:
        """Rows [lo, hi)."""
        return self if hi - lo == self.n else Rows(self.memory, self.begin + lo * self.d, hi - lo, self.d)

    def tensor(self) -> Tensor:
        """A view [R, D]."""
        return self.memory.as_strided((self.n, self.d), (self.d, 1), self.begin)


class MessageMemory:
    """Room for the rows that homes send and await, for those that arrive, and for frames, each with its answers.

    They are apart: an answer is always received, into room that was reserved when its dispatch was sent, and a large
    arrival never waits for room that small frames will have. A block is named by its offset.

    Args:
        home_bytes, arrival_bytes, frame_bytes: sizes of the arenas.
    """

    def __init__(self, device: torch.device, home_bytes: int, arrival_bytes: int, frame_bytes: int = 0):
        self.home = Arena(0, home_bytes)
        self.arrivals = Arena(self.home.end, arrival_bytes)
        self.frames = Arena(self.arrivals.end, frame_bytes)
        self.memory = torch.empty(self.frames.end, dtype=torch.uint8, device=device)
        self._typed = {dtype: self.memory.view(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def arena_of(self, block: int) -> Arena:
        """The arena that a block is of."""
        return next(arena for arena in (self.home, self.arrivals, self.frames) if block < arena.end)

    def give(self, block: int) -> None:
        """Take a block back. Nothing may be about to read or write it."""
        self.arena_of(block).give(block)

    def rows_at(self, offset: int, n: int, d: int, dtype: torch.dtype) -> Rows:
        """Rows [n, D] at an offset in bytes, which is a multiple of their elements'."""
        return Rows(self._typed[dtype], offset // dtype.itemsize, n, d)

    def take_pair(
        self, arena: Arena, n: int, d: int, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> tuple[int, Rows, Rows] | None:
        """A block with n rows [n, D] and, of another dtype, their answers [n, D]; None while there is no room."""
        rows, answers = dtypes
        first = aligned(n * d * rows.itemsize)
        block = arena.take(first + aligned(n * d * answers.itemsize))
        if block is None:
            return None
        return block, self.rows_at(block, n, d, rows), self.rows_at(block + first, n, d, answers)


def block_bytes(parts: Sequence[int]) -> int:
    """Bytes of a block with several parts, each aligned."""
    return sum(map(aligned, parts))
