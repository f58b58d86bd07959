"""The code of the GPU's row kernels, compiled for the host, against the references of `tests/gpu/test_kernels.py`.

What needs a GPU's own products, attention, streams or graphs is left to a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="no Linux, or no g++")
def test_row_kernels_on_the_host() -> None:
    # What a kernel says before it ends the process is not captured. With 1100 slots there are blocks by the thousand.
    options = ["-q", "-p", "no:cacheprovider", "--color=no", "--capture=sys", "-m", "row_kernels", "-k", "not 1100"]
    command = [sys.executable, "-m", "pytest", *options, "tests/gpu/test_kernels.py"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environ["MOEMPI_KERNELS"] = "host"
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[:2000]
    assert "all kernels were launched" in done.stdout and "skipped" not in done.stdout, done.stdout[-1000:]
