"""Control messages between ranks: long ones, which MPI moves only while it is looked at, come whole and in order."""

from __future__ import annotations

from typing import Any

import pytest
from mpi4py import MPI

from moempi.exchange.requests import Requests
from moempi.mpi import meet
from moempi.router.control import Control
from moempi.router.messages import Assignment, Drain, Want, Work

pytestmark = pytest.mark.mpi

LONG = 1_000_000  # tokens of a prompt


def test_long_and_short_messages_of_all_ranks_come_in_order(world: MPI.Intracomm) -> None:
    requests = Requests()
    control = Control(world.Dup(), requests)
    sent = [Want(1), Work([Assignment(world.rank, [world.rank] * LONG, LONG, 1, [])]), Drain(), Want(2)]
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    for message in sent:
        control.send(to, message)
    heard: list[tuple[int, Any]] = []
    while len(heard) < len(sent) or requests:
        requests.test()
        heard += control.receive()
    sent[1] = Work([Assignment(source, [source] * LONG, LONG, 1, [])])
    assert heard == [(source, message) for message in sent]
    meet(world)
    control.free()
