"""The memory of messages on a GPU: allocated once, divided by hand, never torch's to use again.

A block that torch's allocator takes back is reused in the order of a stream; MPI writes into it now. So nothing that
torch allocates is given to MPI. A block here goes back when the last kernel that uses it has ended and its requests
are complete; who holds it sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moempi.device.arena import Arena, aligned


class Block(NamedTuple):
    """A piece of one of the two arenas."""

    offset: int
    home: bool  # of the homes' arena; else of the arrivals'


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
    """Room for the rows that homes send and await, and for those that arrive with their answers.

    The two are apart: an answer is always received, into room that was reserved when its dispatch was sent.

    Args:
        home_bytes, arrival_bytes: sizes of the arenas.
    """

    def __init__(self, device: torch.device, home_bytes: int, arrival_bytes: int):
        self.home = Arena(0, home_bytes)
        self.arrivals = Arena(self.home.end, arrival_bytes)
        self.memory = torch.empty(self.arrivals.end, dtype=torch.uint8, device=device)
        self._typed = {dtype: self.memory.view(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def take(self, nbytes: int, *, home: bool) -> Block | None:
        """A block, or None while there is no room."""
        offset = (self.home if home else self.arrivals).take(nbytes)
        return None if offset is None else Block(offset, home)

    def give(self, block: Block) -> None:
        """Take a block back. Nothing may be about to read or write it."""
        (self.home if block.home else self.arrivals).give(block.offset)

    def take_pair(
        self, n: int, d: int, dtypes: tuple[torch.dtype, torch.dtype], *, home: bool
    ) -> tuple[Block, Rows, Rows] | None:
        """A block with n rows [n, D] and, of another dtype, their answers [n, D]; None while there is no room."""
        rows, answers = dtypes
        first = aligned(n * d * rows.itemsize)
        block = self.take(first + aligned(n * d * answers.itemsize), home=home)
        if block is None:
            return None
        begin, behind = block.offset // rows.itemsize, (block.offset + first) // answers.itemsize
        return block, Rows(self._typed[rows], begin, n, d), Rows(self._typed[answers], behind, n, d)


def block_bytes(parts: Sequence[int]) -> int:
    """Bytes of a block with several parts, each aligned."""
    return sum(map(aligned, parts))
