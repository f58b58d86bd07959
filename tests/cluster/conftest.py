"""The emulated cluster of these tests; where there can be none, they are skipped and say why."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulation import Cluster, missing

# Running, Ended: programs that are watched and signalled, as the tests of launches do it.
sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

NODES = 4
RATE = "1gbit"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes with links of 1 Gbit/s."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with Cluster(NODES, RATE) as made:
        yield made
