"""Dispatches between GPUs that are one message each: a header in front of the rows, as on the CPU (`wire.frame`).

The sender's kernels have written the header, and the receiver's read it: of a frame the host learns its length alone.
A receive is posted before anybody knows how long what comes will be, so rows leave as soon as they are packed, and are
on their way before the receiving host has looked. The largest frame has to be small: a step of decode, not of prefill.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from mpi4py import MPI

from moempi.device.arena import Arena, aligned
from moempi.exchange.requests import Requests
from moempi.exchange.wire import bytes_at


class Frame(NamedTuple):
    """One that is here."""

    source: int
    tag: int
    block: int  # where it begins, in the memory of messages
    nbytes: int


class Frames:
    """Sends frames, and receives them from anyone.

    Args:
        comm: of the frames; theirs from now on.
        memory: address of the memory of messages.
        arena: of the part of it that frames and their answers take.
        largest: bytes of a frame and its answer, the same on all ranks; all blocks are as large, so that what is free
            is whole rooms.
        posted: receives that are there before their frames, where the arena has room.
    """

    def __init__(self, comm: MPI.Intracomm, requests: Requests, memory: int, arena: Arena, largest: int, posted: int):
        self._comm, self._requests, self._memory = comm, requests, memory
        self._arena, self._largest, self._most = arena, largest, posted
        self._posted: list[MPI.Request] = []
        self._blocks: list[int] = []
        self._status = MPI.Status()

    def has_room(self, nbytes: int, answer_bytes: int) -> bool:
        """Whether a frame of so many bytes and its answer have room in a block of whoever gets it."""
        return aligned(nbytes) + answer_bytes <= self._largest

    def send(self, address: int, nbytes: int, peer: int, tag: int, then: Callable[[], Any]) -> None:
        """Send a frame, which is complete; `then` is called when its memory may be used again."""
        self._requests.add(self._comm.Isend(bytes_at(address, nbytes), peer, tag), then)

    @property
    def full(self) -> bool:
        """Whether there is no room for any frame: those that are here have all of it."""
        return not self._posted and self._most > 0

    def take(self) -> Frame | None:
        """A frame that is here; its block is the taker's to give back."""
        while len(self._posted) < self._most and (block := self._arena.take(self._largest)) is not None:
            buffer = bytes_at(self._memory + block, self._largest)
            self._posted.append(self._comm.Irecv(buffer, MPI.ANY_SOURCE, MPI.ANY_TAG))
            self._blocks.append(block)
        if not self._posted:
            return None
        index, found, status = 0, False, self._status
        if len(self._posted) == 1:
            found = self._posted[0].Test(status)  # which looks again once it has moved messages along
        else:
            index, found = MPI.Request.Testany(self._posted, status)
        if not found:
            return None
        del self._posted[index]
        return Frame(status.Get_source(), status.Get_tag(), self._blocks.pop(index), status.Get_count(MPI.BYTE))

    def free(self) -> None:
        """Give the communicator back. Collective."""
        for request in self._posted:
            request.Cancel()
            request.Wait()
        self._comm.Free()
