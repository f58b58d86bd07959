"""Receiving what others send unasked, one kind of message at a time, while the budget of its kind has room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from moempi.exchange.account import Account
from moempi.exchange.lane import Group
from moempi.exchange.requests import Requests


@dataclass(frozen=True)
class Received:
    """A message, and the bytes of its account that it holds until somebody gives them back."""

    source: int  # rank of the job
    tag: int
    buffer: np.ndarray  # uint8
    charged: int


class Inbox:
    """Messages of one communicator.

    Args:
        weigh: bytes to be held for a message of so many bytes.
        arrived: called with every message that is complete.
    """

    def __init__(
        self,
        group: Group,
        account: Account,
        weigh: Callable[[int], int],
        requests: Requests,
        arrived: Callable[[Received], None],
    ) -> None:
        self._group, self._account, self._weigh = group, account, weigh
        self._requests, self._arrived = requests, arrived
        self._status = MPI.Status()

    def poll(self) -> bool:
        """Receive what there is room for, and leave the rest where it is; whether there was any."""
        moved, comm = False, self._group.comm
        while comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, self._status):
            nbytes = self._status.Get_count(MPI.BYTE)
            charged = self._weigh(nbytes)
            if not self._account.take(charged):
                break
            self._receive(self._status.Get_source(), self._status.Get_tag(), nbytes, charged)
            moved = True
        return moved

    def _receive(self, source: int, tag: int, nbytes: int, charged: int) -> None:
        received = Received(self._group.members[source], tag, np.empty(nbytes, dtype=np.uint8), charged)
        request = self._group.comm.Irecv(received.buffer, source, tag)
        self._requests.add(request, lambda: self._arrived(received))
