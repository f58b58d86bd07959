"""Doorbells: a rank that sleeps between two looks at the network is woken by whoever sends to it from the same node.

MPI cannot wait for a message without looking for it again and again, which ranks that share a core take from each
other. Here a rank sleeps on a named pipe of its own, and a sender on its node writes a byte into it after it has handed
the message to MPI. A ring says only "look"; one too many costs a look, and a lost one a sleep that comes to its end.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from mpi4py import MPI

from moempi.mpi import meet

_ALL = 4096  # bytes of rings that one read takes
_MOST_FILES = 1024  # select() knows no higher ones


class Doorbell:
    """The bell of one rank, and the buttons of all on its node, its own too.

    Args:
        own: file descriptor to sleep on; None: there is no bell.
        buttons: by rank, file descriptors to write to.
        n_ranks: of the job.
    """

    def __init__(self, own: int | None = None, buttons: Mapping[int, int] | None = None, n_ranks: int = 0) -> None:
        self._own, self._buttons = own, dict(buttons or {})
        self.hears_all = own is not None and len(self._buttons) == n_ranks

    def ring(self, rank: int) -> None:
        """Wake a rank if it sleeps; nothing happens where it is on another node."""
        button = self._buttons.get(rank)
        if button is not None:
            # A full pipe has rung already, and a rank that has ended needs no ring.
            with contextlib.suppress(OSError):
                os.write(button, b"\0")

    def sleep(self, seconds: float) -> bool:
        """Until somebody rings or has rung since the last sleep, at most so long; whether anybody did."""
        if self._own is None:
            time.sleep(seconds)
            return False
        if not select.select([self._own], [], [], seconds)[0]:
            return False
        os.read(self._own, _ALL)
        return True

    def close(self) -> None:
        """Close the pipes."""
        for file in (self._own, *self._buttons.values()):
            if file is not None:
                os.close(file)
        self._own, self._buttons = None, {}


def hang_doorbells(world: MPI.Intracomm) -> Doorbell:
    """A bell for every rank of every node. Collective.

    The pipes have no names any more when it returns, so that nothing is left behind however the job ends. Where a
    node's folder for temporary files takes none, its ranks have no bells.
    """
    node = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    members = node.allgather(world.rank)
    folder = node.bcast(_make_folder() if node.rank == 0 else None, root=0)
    own = _hang(folder, world.rank) if folder else None
    meet(node)
    buttons = {rank: _button(folder, rank) for rank in members} if folder else {}
    meet(node)
    if node.rank == 0 and folder:
        shutil.rmtree(folder, ignore_errors=True)
    node.Free()
    return Doorbell(own, {rank: file for rank, file in buttons.items() if file is not None}, world.size)


def _make_folder() -> Path | None:
    try:
        return Path(tempfile.mkdtemp(prefix="moempi-"))
    except OSError:
        return None


def _hang(folder: Path, rank: int) -> int | None:
    """Make a pipe; both ends are open here, so that it never reads as ended."""
    try:
        os.mkfifo(folder / str(rank))
        file = os.open(folder / str(rank), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if file < _MOST_FILES:
        return file
    os.close(file)
    return None


def _button(folder: Path, rank: int) -> int | None:
    try:
        return os.open(folder / str(rank), os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
