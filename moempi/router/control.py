"""Small messages between the router and the homes, over a communicator of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from moempi.exchange.requests import Requests


class Control:
    """Sends and receives Python objects without waiting; a rank's messages to itself take no MPI.

    The objects are pickled; they come from ranks of the same job and from nowhere else.

    Args:
        comm: a duplicate that nothing else uses.
        requests: completes the sends.
    """

    def __init__(self, comm: MPI.Intracomm, requests: Requests):
        self.rank = comm.rank
        self._comm, self._requests = comm, requests
        self._own: deque[Any] = deque()
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
        """(source, message) of all that has come."""
        messages = [(self.rank, self._own.popleft()) for _ in range(len(self._own))]
        while self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status):
            source = self._status.Get_source()
            messages.append((source, self._comm.recv(source=source, tag=self._status.Get_tag())))
        return messages

    def free(self) -> None:
        """Give the communicator back. Collective."""
        self._comm.Free()
