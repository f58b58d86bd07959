"""Fixtures of the tests that run on all ranks of one launch. Every rank runs every test; what a test asks is shared."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi4py import MPI

from moempi import mpi


@pytest.fixture(scope="session")
def world() -> MPI.Intracomm:
    """All ranks of the launch."""
    return mpi.start()


@pytest.fixture(scope="session")
def seed(world: MPI.Intracomm) -> int:
    """A new one in every launch, the same on all ranks; MOEMPI_TEST_SEED repeats an earlier launch."""
    text = os.environ.get("MOEMPI_TEST_SEED")
    mine = int(text) if text else secrets.randbelow(2**31)
    mpi.meet(world)
    return world.bcast(mine, root=0)


@pytest.fixture(scope="session")
def _shared(world: MPI.Intracomm) -> Iterator[Path]:
    mine = Path(tempfile.mkdtemp(prefix="moempi-test-")) if world.rank == 0 else None
    mpi.meet(world)
    folder = world.bcast(mine, root=0)
    yield folder
    mpi.meet(world)
    if world.rank == 0:
        shutil.rmtree(folder)


@pytest.fixture
def folder(world: MPI.Intracomm, _shared: Path, request: pytest.FixtureRequest) -> Path:
    """An empty folder that all ranks see. Each test has its own; rank 0 has made it when the fixture returns."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.nodeid.split("/")[-1])
    path = _shared / name
    if world.rank == 0:
        path.mkdir()
    mpi.meet(world)
    return path
