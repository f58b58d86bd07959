"""What the tests of the GPU need. Where there is none they are skipped, each with the reason, and counted as such."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_device import DEVICE, HOST, MISSING

if HOST:
    sys.path.insert(0, str(Path(__file__).with_name("programs")))
    import host_kernels

    host_kernels.install()


    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        missing = host_kernels.never_launched()
        terminalreporter.write_line(f"never launched: {sorted(missing)}" if missing else "all kernels were launched")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture
def random(request: pytest.FixtureRequest) -> Iterator[torch.Generator]:
    """Random numbers where kernels compute; a failure prints the seed."""
    seed = secrets.randbelow(2**31)
    print("seed", seed)
    yield torch.Generator(DEVICE).manual_seed(seed)
