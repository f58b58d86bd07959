"""Lanes and inboxes with a communicator of plain Python: what leaves when, and what is left where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from moempi.exchange.account import Account
from moempi.exchange.inbox import Inbox, Received
from moempi.exchange.lane import Group, Lane, Parcelled
from moempi.recorder import Recorder
from moempi.stages import RELAY_KIND


class Requests:
    """Requests that complete when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], Any]] = []
        self.rung: list[int] = []

    def add(self, _request: object, callback: Callable[[], Any], to: int = -1) -> None:
        self.waiting.append(callback)
        self.rung += [to] * (to >= 0)

    def complete(self) -> None:
        self.waiting.pop(0)()


class Comm:
    """Notes what is sent, and holds messages for a probe."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[int]]] = []
        self.here: list[tuple[int, int, int]] = []  # (source, tag, bytes)

    def Isend(self, message: np.ndarray, peer: int, _tag: int) -> None:  # noqa: N802
        self.sent.append((peer, message.tolist()))

    def Iprobe(self, _source: int, _tag: int, status: Any) -> bool:  # noqa: N802
        if self.here:
            source, tag, nbytes = self.here[0]
            status.Set_source(source)
            status.Set_tag(tag)
            status.Set_elements(MPI.BYTE, nbytes)
        return bool(self.here)

    def Irecv(self, _buffer: np.ndarray, source: int, tag: int) -> None:  # noqa: N802
        assert (source, tag) == self.here.pop(0)[:2]


def frame(value: int, length: int = 4) -> np.ndarray:
    return np.full(length, value, dtype=np.uint8)


def a_lane(most_bytes: int) -> tuple[Lane, Comm, Requests, Recorder]:
    comm, requests = Comm(), Requests()
    recorder = Recorder("summary", 0, 9, 3, 4, 2)
    lane = Lane(Group(comm, (1, 3, 7)), 7, RELAY_KIND, most_bytes, requests, recorder)  # type: ignore[arg-type]
    return lane, comm, requests, recorder


def test_two_messages_leave_at_once_and_the_rest_together() -> None:
    lane, comm, requests, recorder = a_lane(100)
    gone: list[int] = []
    for value in range(5):
        lane.put(Parcelled(frame(value), layer=value % 3, rows=2, gone=lambda v=value: gone.append(v)))
    # Rank 7 is number 2 of the communicator. Nothing waited for company.
    assert comm.sent == [(2, [0] * 4), (2, [1] * 4)]
    requests.complete()
    assert gone == [0]
    assert comm.sent[2:] == [(2, [2] * 4 + [3] * 4 + [4] * 4)]
    requests.complete()
    requests.complete()
    assert gone == [0, 1, 2, 3, 4] and not requests.waiting
    assert requests.rung == [7] * 3  # the rank of the job, whatever the communicator calls it
    taken = recorder.take()
    traffic = {name: taken[f"traffic/{name}"].tolist() for name in ("layer", "rows", "bytes", "messages")}
    # Frames count in their own layers, the shared message with its first frame.
    assert traffic == {"layer": [0, 1, 2], "rows": [4, 4, 2], "bytes": [8, 8, 4], "messages": [1, 1, 1]}


def test_a_shared_message_has_a_bound_and_a_single_frame_has_none() -> None:
    lane, comm, requests, _ = a_lane(10)
    for value, length in enumerate((4, 4, 4, 4, 4, 30, 4)):
        lane.put(Parcelled(frame(value, length), 0, 1, lambda: None))
    while requests.waiting:
        requests.complete()
    assert [len(message) for _, message in comm.sent] == [4, 4, 8, 4, 30, 4]


def test_an_account_takes_what_fits_and_an_empty_one_anything() -> None:
    account = Account(10)
    assert account.take(50) and not account.take(1)
    account.give(50)
    assert account.take(6) and account.take(4) and not account.take(1)
    assert account.held == 10


def test_an_inbox_leaves_messages_that_there_is_no_room_for() -> None:
    comm, requests, account = Comm(), Requests(), Account(10)
    comm.here = [(0, 5, 4), (2, 6, 4), (1, 7, 4)]
    came: list[Received] = []
    inbox = Inbox(Group(comm, (1, 3, 7)), account, lambda n: n + 1, requests, came.append)  # type: ignore[arg-type]
    assert inbox.poll() and comm.here == [(1, 7, 4)] and account.held == 10
    assert not inbox.poll()
    requests.complete()
    requests.complete()
    assert [(one.source, one.tag, len(one.buffer), one.charged) for one in came] == [(1, 5, 4, 5), (7, 6, 4, 5)]
    account.give(came[0].charged)
    assert inbox.poll() and not comm.here
