"""What benchmarks need of GPUs: which one a rank takes, and memory of it that MPI may have."""

from __future__ import annotations

import os
from typing import Any

import torch
from mpi4py import MPI

from moempi.device.cuda_binding import gpu_index, refuse_allocators, why_not_here
from moempi.errors import JobError
from moempi.exchange.topology import Topology
from moempi.mpi import agree


def take_gpu(topology: Topology) -> int:
    """Let this rank take a GPU, in turns where there are fewer than ranks; its number. Collective.

    Raises:
        AgreedError: a rank has none, with the reason.
    """
    missing = why_not_here()
    error = None
    if missing:
        error = JobError(f"--device cuda: {missing}, or measure with --device cpu")
    else:
        try:
            refuse_allocators(os.environ)
        except JobError as caught:
            error = caught
    agree(topology.world, error)
    local, n_local = topology.place_on_node
    index = gpu_index(local, n_local, torch.cuda.device_count(), share=True)
    torch.cuda.set_device(index)
    return index


class GpuBuffers:
    """Makes messages in the memory of this rank's GPU, and keeps them: what MPI has seen must not be torch's again."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []

    def __call__(self, n_bytes: int) -> Any:
        """A buffer that can be sliced."""
        memory = torch.ones(n_bytes, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self._kept.append(memory)
        return MPI.buffer.fromaddress(memory.data_ptr(), n_bytes)
