"""Compiling Triton's kernels ahead: its own search for the kernel that fits takes longer than a launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moempi.device.cuda_launch import current_stream

WIDE = 16  # bytes to which an address is aligned, or not: kernels differ in it


def compiled(
    function: Any,
    pointers: Sequence[tuple[torch.dtype, bool] | None],
    numbers: Sequence[int | float],
    constants: Mapping[str, int | bool],
    **options: int,
) -> Compiled:
    """A kernel for arguments of a kind.

    Args:
        function: of Triton, whose parameters are pointers, numbers and constants, in this order.
        pointers: what each points at, and whether it is aligned to `WIDE`; None for a pointer that is not used.
        numbers: of the kind of those that will come.
        constants: by name, in their order.
        options: num_warps, num_stages.
    """
    given = [None if p is None else _Pointer(*p) for p in pointers]
    kernel = function.warmup(*given, *numbers, **constants, **options, grid=(1,))
    return Compiled(kernel, tuple(constants.values()))


class Compiled:
    """A kernel that is called with addresses and numbers.

    Args:
        kernel: as Triton has compiled it.
        constants: that it was compiled with.
    """

    def __init__(self, kernel: Any, constants: tuple[int | bool, ...]):
        self._kernel, self._constants = kernel, constants

    def __call__(self, grid: tuple[int, int, int], *arguments: int | float | None) -> None:
        """Launch on torch's current stream."""
        self._kernel[grid](*arguments, *self._constants, stream=current_stream())


class _Pointer:
    """What Triton asks of a tensor in order to compile for it."""

    def __init__(self, dtype: torch.dtype, aligned: bool):
        self.dtype, self._address = dtype, 0 if aligned else dtype.itemsize

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0
