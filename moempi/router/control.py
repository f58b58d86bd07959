"""Small messages between the router and the homes, over a communicator of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mpi4py import MPI

from moempi.exchange.requests import Requests


@dataclass
class _Coming:
    """A message that is being received."""

    buffer: bytearray
    whole: bool = False


class Control:
    """Sends and receives Python objects without waiting; a rank's messages to itself take no MPI.

    The objects are pickled; they come from ranks of the same job and from nowhere else.

    Args:
        comm: a duplicate that nothing else uses.
        requests: completes what is sent, and what takes more than a look to receive.
    """

    def __init__(self, comm: MPI.Intracomm, requests: Requests):
        self.rank = comm.rank
        self._comm, self._requests = comm, requests
        self._own: deque[Any] = deque()
        self._coming: dict[int, deque[_Coming]] = {}  # by source, in the order in which they were sent
        self._status = MPI.Status()

    def send(self, destination: int, message: Any, taken: Callable[[], None] = lambda: None) -> None:
        """Hand a message to another rank, or to this one at its next `receive`.

        Args:
            taken: called once the other rank has taken the message; not for one to this rank.
        """
        if destination == self.rank:
            self._own.append(message)
            self._requests.bell.ring(self.rank)
        else:
            self._requests.add(self._comm.issend(message, destination), taken, to=destination)

    def receive(self) -> list[tuple[int, Any]]:
        """(source, message) of all that is here whole; those of one source come in the order in which it sent them."""
        messages = [(self.rank, self._own.popleft()) for _ in range(len(self._own))]
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status):
            self._begin(self._status.Get_source(), self._status.Get_tag(), self._status.Get_count(MPI.BYTE))
        for source, coming in list(self._coming.items()):
            while coming and coming[0].whole:
                messages.append((source, MPI.pickle.loads(coming.popleft().buffer)))
            if not coming:
                del self._coming[source]
        return messages

    def _begin(self, source: int, tag: int, nbytes: int) -> None:
        one = _Coming(bytearray(nbytes))
        self._coming.setdefault(source, deque()).append(one)
        request = self._comm.Irecv([one.buffer, MPI.BYTE], source, tag)
        # A short message is here with its first byte. A long one may need its sender, which nobody waits for.
        if request.Test():
            one.whole = True
        else:
            self._requests.add(request, partial(self._end, one))

    def _end(self, one: _Coming) -> None:
        one.whole = True
        self._requests.bell.ring(self.rank)  # or this rank may sleep before it looks

    def free(self) -> None:
        """Give the communicator back. Collective."""
        self._comm.Free()
