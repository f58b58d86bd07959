"""What the tests of the GPU's kernels compute on: a GPU, or the host, which runs the row kernels' code for them."""

from __future__ import annotations

import os

import torch

HOST = os.environ.get("MOEMPI_KERNELS") == "host"  # set by tests/launch/test_kernel_code.py
DEVICE = "cpu" if HOST else "cuda"
MISSING = "" if HOST or torch.cuda.is_available() else "torch sees no GPU here"
