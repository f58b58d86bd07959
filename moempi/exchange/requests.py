"""Nonblocking MPI operations under way on one rank, and what happens when each ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from moempi.exchange.doorbell import Doorbell


class Requests:
    """The one place that completes requests that end by themselves. Buffers are kept alive by their callbacks.

    Args:
        looks: that a test takes. Open MPI moves messages along in one that finds nothing; what that has completed, the
            next one finds: two before a rank sleeps, one where it looks again at once.

    Attributes:
        bell: is rung for every send that says whom it goes to.
    """

    def __init__(self, looks: int = 2) -> None:
        self._looks = looks
        self.bell = Doorbell()
        self._requests: list[MPI.Request] = []
        self._callbacks: list[Callable[[], Any]] = []

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: MPI.Request, callback: Callable[[], Any], to: int = -1) -> None:
        """Call `callback` once the request is complete; `to`: rank of the job that a send goes to, which is woken."""
        self._requests.append(request)
        self._callbacks.append(callback)
        if to >= 0:
            self.bell.ring(to)

    def test(self) -> bool:
        """Complete what has ended, without waiting; whether anything had."""
        if not self._requests:
            return False
        for _ in range(self._looks):
            if ended := MPI.Request.Testsome(self._requests):
                break
        else:
            return False
        callbacks = [self._callbacks[i] for i in ended]
        for i in sorted(ended, reverse=True):
            del self._requests[i], self._callbacks[i]
        for callback in callbacks:
            callback()
        return True
