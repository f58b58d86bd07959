"""Between the host and the GPU, without waiting: small tensors, and the rows of messages that go through the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cupy.cuda import runtime
from torch import Tensor

from moempi.device.cuda_clock import Clock
from moempi.errors import MoempiError


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host tensor on the GPU, in the order of the current stream; the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """Pinned host memory that will hold the tensor once the current stream has come to here."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


class Copies:
    """Copies between the memory of the GPU and pinned memory of the host, each way on a stream of its own."""

    def __init__(self) -> None:
        self._down, self._up = torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=-1)
        self._down_clock, self._up_clock = Clock(self._down), Clock(self._up)
        self.clocks = (self._down_clock, self._up_clock)

    def to_host(self, device: int, host: int, nbytes: int, then: Callable[[], Any]) -> None:
        """Copy from an address on the GPU to one of the host; `then` is called when it is there."""
        runtime.memcpyAsync(host, device, nbytes, runtime.memcpyDeviceToHost, self._down.cuda_stream)
        self._down_clock.after(then)

    def to_device(self, host: int, device: int, nbytes: int, then: Callable[[], Any]) -> None:
        """Copy from an address of the host to one on the GPU; `then` is called when kernels may read it."""
        runtime.memcpyAsync(device, host, nbytes, runtime.memcpyHostToDevice, self._up.cuda_stream)
        self._up_clock.after(then)


def pin(address: int, nbytes: int) -> None:
    """Let the GPU read and write memory of the host at full speed, until `unpin`.

    Raises:
        MoempiError: the system does not allow it.
    """
    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if code:
        raise MoempiError(f"{nbytes} bytes of the host's memory cannot be pinned (CUDA error {code})")


def unpin(address: int) -> None:
    """End `pin`."""
    torch.cuda.cudart().cudaHostUnregister(address)
