"""The memory of messages on a GPU: allocated once, divided by hand, never torch's to use again.

A block that torch's allocator takes back is reused in the order of a stream; MPI writes into it now. So nothing that
torch allocates is given to MPI. A block here goes back when the last kernel that uses it has ended and its requests
are complete; who holds it sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moempi.device.arena import Arena, aligned


@dataclass(frozen=True)
class Block:
    """A piece of one of the two arenas."""

    offset: int
    home: bool  # of the homes' arena; else of the arrivals'


class MessageMemory:
    """Room for the rows that homes send and await, and for those that arrive with their answers.

    The two are apart: an answer is always received, into room that was reserved when its dispatch was sent.

    Args:
        home_bytes, arrival_bytes: sizes of the arenas.
        staged: MPI gets pinned host memory of the same layout instead of the GPU's.
    """

    def __init__(self, device: torch.device, home_bytes: int, arrival_bytes: int, *, staged: bool):
        self.home = Arena(0, home_bytes)
        self.arrivals = Arena(self.home.end, arrival_bytes)
        self.memory = torch.empty(self.arrivals.end, dtype=torch.uint8, device=device)
        self.host = torch.empty(self.arrivals.end, dtype=torch.uint8, pin_memory=True) if staged else None
        self.copies = torch.cuda.Stream(device, priority=-1) if staged else None

    def take(self, nbytes: int, *, home: bool) -> Block | None:
        """A block, or None while there is no room."""
        offset = (self.home if home else self.arrivals).take(nbytes)
        return None if offset is None else Block(offset, home)

    def give(self, block: Block) -> None:
        """Take a block back. Nothing may be about to read or write it."""
        (self.home if block.home else self.arrivals).give(block.offset)

    def rows(self, block: Block, skip: int, n: int, d: int, dtype: torch.dtype) -> Tensor:
        """n rows [n, D] of a block, behind `skip` bytes."""
        begin = block.offset + skip
        return self.memory[begin : begin + n * d * dtype.itemsize].view(dtype).view(n, d)

    def address(self, rows: Tensor) -> int:
        """Where MPI finds or puts rows of this memory."""
        if self.host is None:
            return rows.data_ptr()
        return self.host.data_ptr() + rows.data_ptr() - self.memory.data_ptr()

    def leave(self, rows: Tensor) -> torch.cuda.Event | None:
        """Get rows, which are complete, ready for MPI to read; None: they are, else once the event has passed."""
        return self._copy(rows, to_host=True)

    def land(self, rows: Tensor) -> torch.cuda.Event | None:
        """Make rows that MPI has written visible to kernels; None: they are, else once the event has passed."""
        return self._copy(rows, to_host=False)

    def _copy(self, rows: Tensor, *, to_host: bool) -> torch.cuda.Event | None:
        if self.host is None or self.copies is None:
            return None
        begin = rows.data_ptr() - self.memory.data_ptr()
        there, here = self.memory[begin : begin + rows.nbytes], self.host[begin : begin + rows.nbytes]
        with torch.cuda.stream(self.copies):
            (here if to_host else there).copy_(there if to_host else here, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return event


def block_bytes(parts: Sequence[int]) -> int:
    """Bytes of a block with several parts, each aligned."""
    return sum(aligned(part) for part in parts)
