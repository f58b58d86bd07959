"""Links are measured between every two ranks, whatever their number: 1 (none), 2, 3 and 5."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from mpi4py import MPI

from moempi.bench.links import host_buffer, measure_links
from moempi.mpi import meet

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_pair_is_measured_once(world: MPI.Intracomm, ranks: int) -> None:
    ranks = min(ranks, world.size)
    made: list[int] = []

    def buffer(n_bytes: int) -> np.ndarray:
        made.append(n_bytes)
        return host_buffer(n_bytes)

    # The last rank leads: rank numbers are those of the communicator, not of the world.
    part = world.Split(0 if world.rank >= world.size - ranks else MPI.UNDEFINED, -world.rank)
    if part != MPI.COMM_NULL:
        links = measure_links(part, largest=100_000, repeats=2, limit=5.0, make_buffer=buffer)
        assert made == [100_000]
        assert (links is None) == (part.rank > 0)
        if links is not None:
            assert list(zip(links.source, links.destination, strict=True)) == list(combinations(range(ranks), 2))
            assert links.size.tolist() == [4**power for power in range(9)] + [100_000]
            assert links.time.shape == (len(links.source), 10) and (links.time > 0).all()
            assert (links.latency > 0).all() and (links.bandwidth > 0).all()
            assert len(links.oversubscription) == ranks and (links.oversubscription >= 1).all()
            assert links.node.tolist() == [0] * ranks and not links.between.any()
        part.Free()
    meet(world)
