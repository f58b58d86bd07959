"""Lanes: what a relay sends to one peer, at most two messages at a time, each of all that has come together by then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from moempi.exchange.requests import Requests
from moempi.recorder import Recorder

IN_FLIGHT = 2


@dataclass(frozen=True)
class Group:
    """A communicator and the ranks of the job that are in it, in order."""

    comm: MPI.Intracomm
    members: tuple[int, ...]

    def place(self, rank: int) -> int:
        """A rank of the job as the communicator numbers it."""
        return self.members.index(rank)


@dataclass(frozen=True)
class Parcelled:
    """A frame that waits for its turn."""

    frame: np.ndarray  # uint8
    layer: int
    rows: int
    gone: Callable[[], Any]  # called when it has been sent


class Lane:
    """The way to one peer.

    It never waits to fill a message: what is there leaves as soon as fewer than two messages are under way.

    Args:
        peer: rank of the job.
        kind: of its traffic, for the recorder.
        most_bytes: frames are put into one message up to this length; one frame may be longer.
    """

    def __init__(
        self, group: Group, peer: int, kind: int, most_bytes: int, requests: Requests, recorder: Recorder
    ) -> None:
        self._group, self._peer, self._kind, self._most_bytes = group, peer, kind, most_bytes
        self._requests, self._recorder = requests, recorder
        self._queue: deque[Parcelled] = deque()
        self._under_way = 0

    def put(self, one: Parcelled) -> None:
        """Send a frame as soon as there is a turn for it."""
        self._queue.append(one)
        self._push()

    def _push(self) -> None:
        while self._queue and self._under_way < IN_FLIGHT:
            taken = self._take()
            frames = [one.frame for one in taken]
            message = frames[0] if len(frames) == 1 else np.concatenate(frames)
            # Messages of one pair of ranks arrive in order: their receiver needs no tag to tell them apart.
            request = self._group.comm.Isend(message, self._group.place(self._peer), 0)
            self._under_way += 1
            self._requests.add(request, partial(self._sent, message, taken), to=self._peer)
            whole = message.nbytes
            for one in taken:
                self._recorder.sent(self._kind, one.layer, self._peer, one.rows, one.frame.nbytes, whole)
                whole = 0  # the message counts with its first frame

    def _take(self) -> list[Parcelled]:
        taken = [self._queue.popleft()]
        nbytes = taken[0].frame.nbytes
        while self._queue and nbytes + self._queue[0].frame.nbytes <= self._most_bytes:
            nbytes += self._queue[0].frame.nbytes
            taken.append(self._queue.popleft())
        return taken

    def _sent(self, _message: np.ndarray, taken: list[Parcelled]) -> None:
        self._under_way -= 1
        for one in taken:
            one.gone()
        self._push()


class Lanes:
    """A lane to every peer that is sent anything, made when it first is; arguments as of `Lane`."""

    def __init__(self, group: Group, kind: int, most_bytes: int, requests: Requests, recorder: Recorder) -> None:
        self._make = lambda peer: Lane(group, peer, kind, most_bytes, requests, recorder)
        self._lanes: dict[int, Lane] = {}

    def to(self, peer: int) -> Lane:
        """The lane to a rank of the job."""
        if peer not in self._lanes:
            self._lanes[peer] = self._make(peer)
        return self._lanes[peer]
