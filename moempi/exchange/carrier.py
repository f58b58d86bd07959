"""How rows travel between the GPUs of two ranks: from one to the other, or through pinned memory of the hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from moempi.device.cuda_memory import Rows
from moempi.device.cuda_transfer import Copies
from moempi.exchange.host_memory import HostMemory
from moempi.exchange.requests import Requests
from moempi.exchange.wire import bytes_at

Then = Callable[[], Any]


class Carrier(Protocol):
    """Messages of rows, named by peer and tag; a send and a receive of one name meet in their order."""

    def send(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        """Send rows, which are complete; `then` is called when their memory may be used again."""

    def receive(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        """Receive into rows; `then` is called when kernels may read them."""

    def free(self) -> None:
        """Give the communicators back. Collective."""


class Direct:
    """From GPU to GPU: MPI takes their memory.

    Args:
        comm: of the messages; the carrier's from now on.
    """

    def __init__(self, comm: MPI.Intracomm, requests: Requests):
        self._comm, self._requests = comm, requests

    def send(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        """Send rows, which are complete; `then` is called when their memory may be used again."""
        self._requests.add(self._comm.Isend(bytes_at(rows.address, rows.nbytes), peer, tag), then)

    def receive(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        """Receive into rows; `then` is called when kernels may read them."""
        self._requests.add(self._comm.Irecv(bytes_at(rows.address, rows.nbytes), peer, tag), then)

    def free(self) -> None:
        """Give the communicator back. Collective."""
        self._comm.Free()


class Staged:
    """Through pinned memory of the hosts, which has the layout of that on the GPUs.

    A rank of the same node is told where the rows lie, fetches them itself and says when it has them; one of another
    node gets them by MPI.

    Args:
        comm: of the messages; the carrier's from now on.
    """

    def __init__(self, comm: MPI.Intracomm, requests: Requests, host: HostMemory, copies: Copies):
        self._comm, self._fetched = comm, comm.Dup()
        self._requests, self._host, self._copies = requests, host, copies

    def send(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        """Send rows, which are complete; `then` is called when their memory may be used again."""
        host, leave = self._host.own + rows.offset, self._tell if peer in self._host.others else self._post
        self._copies.to_host(rows.address, host, rows.nbytes, lambda: leave(rows, peer, tag, then))

    def _tell(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        place, nothing = np.array([rows.offset], dtype=np.int64), np.empty(0, dtype=np.uint8)
        self._requests.add(self._fetched.Irecv(nothing, peer, tag), then)
        self._requests.add(self._comm.Isend(place, peer, tag), lambda: place)

    def _post(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        self._requests.add(self._comm.Isend(bytes_at(self._host.own + rows.offset, rows.nbytes), peer, tag), then)

    def receive(self, rows: Rows, peer: int, tag: int, then: Then) -> None:
        """Receive into rows; `then` is called when kernels may read them."""
        if peer in self._host.others:
            place = np.empty(1, dtype=np.int64)
            request = self._comm.Irecv(place, peer, tag)
            self._requests.add(request, lambda: self._fetch(rows, int(place[0]), peer, tag, then))
        else:
            host = self._host.own + rows.offset
            request = self._comm.Irecv(bytes_at(host, rows.nbytes), peer, tag)
            self._requests.add(request, lambda: self._copies.to_device(host, rows.address, rows.nbytes, then))

    def _fetch(self, rows: Rows, place: int, peer: int, tag: int, then: Then) -> None:
        def here() -> None:
            nothing = np.empty(0, dtype=np.uint8)
            self._requests.add(self._fetched.Isend(nothing, peer, tag), lambda: nothing)
            then()

        self._copies.to_device(self._host.others[peer] + place, rows.address, rows.nbytes, here)

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self._comm.Free()
        self._fetched.Free()
