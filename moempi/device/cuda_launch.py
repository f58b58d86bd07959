"""Launching a kernel with next to nothing of the host's time.

CuPy's own call makes an object of every argument. Here the arguments of a kernel lie in one array, which the driver
reads while it launches: what is left is one call of the driver.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import cupy
import torch
from cupy.cuda import driver


class Kernel:
    """A kernel whose parameters are pointers, 64-bit integers and floats.

    Args:
        raw: compiled by CuPy; kept, and with it the module that it is part of.
        n_parameters: of the kernel.
        words: that the last parameter has, where that is a struct of integers.
    """

    def __init__(self, raw: cupy.RawKernel, n_parameters: int, words: int = 1):
        self._raw, self._function = raw, raw.kernel.ptr
        self._is_struct, self._values = words > 1, (ctypes.c_int64 * (n_parameters - 1 + words))()
        begin = ctypes.addressof(self._values)
        self._places = (ctypes.c_void_p * n_parameters)(*range(begin, begin + 8 * n_parameters, 8))
        self._parameters = ctypes.addressof(self._places)

    def __call__(self, blocks: int, threads: int, values: list[Any], shared: int = 0) -> None:
        """Launch on torch's current stream.

        Args:
            values: an address, an integer, or `float_bits` of a float for every parameter; of a struct the first words.
            shared: bytes of memory that a block asks for.
        """
        if self._is_struct:
            self._values[: len(values)] = values
        else:
            self._values[:] = values
        driver.launchKernel(self._function, blocks, 1, 1, threads, 1, 1, shared, current_stream(), self._parameters, 0)


def current_stream() -> int:
    """Torch's current stream as the driver knows it; torch's own call makes an object for it."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
    return stream


@cache
def float_bits(value: float) -> int:
    """A float32 as it lies in a parameter of 8 bytes."""
    return int.from_bytes(struct.pack("<f", value), "little")
