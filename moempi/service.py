"""What a rank does about control messages every turn of its engine: hears the router, and on rank 0 is the router."""

from __future__ import annotations

from moempi.home import Home
from moempi.mpi import Drain
from moempi.progress import Progress
from moempi.router.control import Control
from moempi.router.messages import Alive, DrainWanted, End, Left, Work
from moempi.router.messages import Drain as DrainNow
from moempi.router.router import Outgoing, Router
from moempi.router.watch import Watch


class Service:
    """Passes messages between control channel, home and router.

    Args:
        router: on rank 0, else None.
        watch: sends and misses signs of life.
        drain: set by a signal on any rank; the router is told once.
        progress: told of the router's counts; rank 0 only.
    """

    def __init__(
        self, control: Control, home: Home, router: Router | None, watch: Watch, drain: Drain, progress: Progress
    ):
        self._control, self._home, self._router, self._watch = control, home, router, watch
        self._drain, self._progress = drain, progress
        self._told = False

    def start(self) -> None:
        """Hand out the first sequences."""
        self._progress.begin()
        if self._router is not None:
            self._send(self._router.start())

    def __call__(self) -> bool:
        """Act on what has come; whether anything had."""
        if self._drain.requested and not self._told:
            self._told = True
            self._control.send(0, DrainWanted())
        messages = self._control.receive()
        for source, message in messages:
            if isinstance(message, Alive | Left):
                self._watch.hear(source, message)
            elif isinstance(message, Work | DrainNow | End):
                self._home.hear(message)
            elif self._router is not None:
                self._send(self._router.handle(source, message))
        if self._router is not None:
            self._progress.show(self._router, self._watch.count_tokens)
        if self._home.ended:
            self._progress.clear()
            self._watch.leave()
        self._watch.look()
        return bool(messages)

    def _send(self, outgoing: Outgoing) -> None:
        for rank, message in outgoing:
            self._control.send(rank, message)
