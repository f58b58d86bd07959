"""Bells between the ranks of a node."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from mpi4py import MPI

from moempi.exchange.doorbell import Doorbell, hang_doorbells
from moempi.mpi import meet

pytestmark = pytest.mark.mpi

LONG = 60.0  # a sleep of which nobody waits for the end


def test_a_ring_ends_a_sleep_and_is_heard_once(world: MPI.Intracomm) -> None:
    bell = hang_doorbells(world)
    assert bell.hears_all  # the ranks of the tests are on one node
    bell.ring((world.rank + 1) % world.size)  # alone, a rank rings for itself
    assert bell.sleep(LONG)
    meet(world)
    assert not bell.sleep(0.001)
    bell.close()


def test_many_rings_block_nobody_and_are_one(world: MPI.Intracomm) -> None:
    bell = hang_doorbells(world)
    for _ in range(70_000):  # more than a pipe holds
        bell.ring((world.rank + 1) % world.size)
    meet(world)
    rung = [bell.sleep(0.0) for _ in range(20)]
    assert any(rung)
    assert not rung[-1]
    bell.close()


def test_nothing_is_left_and_the_end_of_a_rank_is_no_error(world: MPI.Intracomm) -> None:
    before = set(Path(tempfile.gettempdir()).glob("moempi-*"))
    meet(world)
    bell = hang_doorbells(world)
    meet(world)
    assert not [path for path in set(Path(tempfile.gettempdir()).glob("moempi-*")) - before if is_ours(path)]
    if world.rank:
        bell.close()
    meet(world)
    bell.ring(world.size - 1)
    bell.close()


def is_ours(path: Path) -> bool:
    """A folder of pipes."""
    return path.is_dir() and any(child.is_fifo() for child in path.iterdir())


def test_without_a_bell_a_sleep_is_a_sleep(world: MPI.Intracomm) -> None:
    bell = Doorbell()
    bell.ring(0)
    assert not bell.sleep(0.001)
    assert not bell.hears_all
    bell.close()
