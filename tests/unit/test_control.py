"""Control messages that take their time, with a communicator of plain Python: nobody waits, order per source holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from moempi.router.control import Control
from moempi.router.messages import Alive, Assignment, Drain, Want, Work


class Bell:
    def __init__(self) -> None:
        self.rung: list[int] = []

    def ring(self, rank: int) -> None:
        self.rung.append(rank)


class Requests:
    """Receives that are complete when a test says so."""

    def __init__(self) -> None:
        self.bell = Bell()
        self.waiting: list[Callable[[], Any]] = []

    def add(self, _request: object, callback: Callable[[], Any], to: int = -1) -> None:
        self.waiting.append(callback)


class Receive:
    """A receive; that of a long message has only its announcement so far."""

    def __init__(self, whole: bool) -> None:
        self.whole = whole

    def Test(self) -> bool:  # noqa: N802
        return self.whole


class Comm:
    """Rank 0's; messages that have been announced, and whether all of each is here."""

    rank = 0

    def __init__(self, *messages: tuple[int, Any, bool]) -> None:
        self.here = [(source, MPI.pickle.dumps(message), whole) for source, message, whole in messages]

    def Iprobe(self, _source: int, _tag: int, status: MPI.Status) -> bool:  # noqa: N802
        if self.here:
            source, data, _ = self.here[0]
            status.Set_source(source)
            status.Set_tag(0)
            status.Set_elements(MPI.BYTE, len(data))
        return bool(self.here)

    def Irecv(self, spec: list[Any], source: int, _tag: int) -> Receive:  # noqa: N802
        found, data, whole = self.here.pop(0)
        assert found == source
        spec[0][:] = data
        return Receive(whole)


def control(*messages: tuple[int, Any, bool]) -> tuple[Control, Requests]:
    requests = Requests()
    return Control(Comm(*messages), requests), requests  # type: ignore[arg-type]


def test_short_messages_are_there_at_the_first_look() -> None:
    hears, requests = control((1, Want(2), True), (2, Alive(""), True), (1, Want(1), True))
    hears.send(0, Drain())
    assert hears.receive() == [(0, Drain()), (1, Want(2)), (1, Want(1)), (2, Alive(""))]
    assert hears.receive() == [] and not requests.waiting


def test_a_long_message_keeps_only_later_ones_of_its_source_waiting() -> None:
    work = Work([Assignment(0, [1] * 5000, 5000, 1, [])])
    hears, requests = control((1, work, False), (1, Drain(), True), (2, Alive(""), True))
    assert hears.receive() == [(2, Alive(""))]
    assert hears.receive() == [] and not requests.bell.rung
    requests.waiting.pop()()
    assert requests.bell.rung == [0]  # it is looked for at once
    assert hears.receive() == [(1, work), (1, Drain())]
    assert hears.receive() == []
