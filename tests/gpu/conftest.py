"""What the tests of the GPU need. Where there is none they are skipped, each with the reason, and counted as such."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = "" if torch.cuda.is_available() else "torch sees no GPU here"
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture
def random(request: pytest.FixtureRequest) -> Iterator[torch.Generator]:
    """Random numbers on the GPU; a failure prints the seed."""
    seed = secrets.randbelow(2**31)
    print("seed", seed)
    yield torch.Generator("cuda").manual_seed(seed)
