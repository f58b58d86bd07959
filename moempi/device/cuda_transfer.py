"""Between the host and the GPU, without waiting: small tensors, and the rows of messages that go through the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from cupy.cuda import runtime
from torch import Tensor

from moempi.device.cuda_clock import Clock
from moempi.device.cuda_launch import current_stream
from moempi.errors import MoempiError

_TAKEN_ALONG = 2**16  # bytes that the driver copies, from any memory of the host, while it is called


def all_to_device(tensors: Mapping[str, Tensor], memory: Tensor) -> dict[str, Tensor]:
    """Copies of small host tensors of at most two dimensions, int32 or int64, in one transfer; the host does not wait.

    Args:
        memory: int64 [>= `words_of(tensors)`] on the GPU, in which the copies will lie, in their order; they are
            there once the current stream has come to here.

    Returns:
        By name, views of `memory` with the shapes and dtypes of the tensors.
    """
    host = staged(tensors)
    memory[: len(host)].copy_(host, non_blocking=True)
    return views(tensors, memory)


def staged(tensors: Mapping[str, Tensor]) -> Tensor:
    """Pinned memory, int64, with copies of small tensors as `all_to_device` lays them out."""
    begins, n = _places(tensors)
    host = torch.empty(n, dtype=torch.int64, pin_memory=True)
    into = host.numpy().view(np.uint8)
    for tensor, begin in zip(tensors.values(), begins, strict=True):
        if tensor.numel():
            into[8 * begin : 8 * begin + tensor.nbytes] = tensor.numpy().reshape(-1).view(np.uint8)
    return host


def views(tensors: Mapping[str, Tensor], memory: Tensor) -> dict[str, Tensor]:
    """By name, views of such memory with the shapes and dtypes of the tensors."""
    flat = {torch.int64: memory, torch.int32: memory.view(torch.int32)}
    return {
        name: flat[tensor.dtype].as_strided(tensor.shape, tensor.stride(), begin * 8 // tensor.itemsize)
        for (name, tensor), begin in zip(tensors.items(), _places(tensors)[0], strict=True)
    }


def words_of(tensors: Mapping[str, Tensor]) -> int:
    """int64 words that `all_to_device` fills."""
    return _places(tensors)[1]


def _places(tensors: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """Where each of them begins, and how long all are, in words of 8 bytes; each is aligned to 16 bytes."""
    begins, n = [], 0
    for tensor in tensors.values():
        begins.append(n)
        n += -(-tensor.nbytes // 16) * 2
    return begins, n


def put(array: np.ndarray, target: Tensor) -> None:
    """Copy an array to the begin of a flat tensor on the GPU, of the same dtype, in the order of the current stream."""
    if array.nbytes <= _TAKEN_ALONG:
        source = array.__array_interface__["data"][0]
        runtime.memcpyAsync(target.data_ptr(), source, array.nbytes, runtime.memcpyHostToDevice, current_stream())
    else:
        target[: array.size].copy_(torch.from_numpy(array.reshape(-1)).pin_memory(), non_blocking=True)


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
