"""The code of the GPU's row kernels, compiled for the host, against the references of `tests/gpu/test_kernels.py`.

What needs a GPU's own products, attention, streams or graphs is left to a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ("rms_norm", "swiglu", "sort_pack", "padding", "headers", "choose", "equal_scores", "take_turns", "greedy",
           "no_number", "sum_and_norm", "heads", "find_the_rows", "more_batches")  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_row_kernels_on_the_host() -> None:
    # With 1100 slots there are blocks by the thousand.
    wanted = f"({' or '.join(KERNELS)}) and not 1100"
    pytest_quietly = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest_quietly, "tests/gpu/test_kernels.py", "-k", wanted]
    environ = {**os.environ, "MOEMPI_KERNELS": "host"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed, \d+ deselected", done.stdout)
    assert passed and int(passed[1]) > 150 and "skipped" not in done.stdout, done.stdout[-500:]
