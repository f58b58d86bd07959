"""The inner loop of every product: a block of sums that stays in registers while inputs go by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

from moempi.device.kernels.lanes import VECTOR, ZERO, read_lanes, splat_at, write_lanes

Read = Callable[[ir.IRBuilder, Any], Any]  # sixteen values of a panel at an address
Times = Callable[[ir.IRBuilder, Any, Any, Any], Any]  # those, a row's value for all of them, and the sums so far


def block(rows: int, vectors: int, read: Read, times: Times, resumed: bool) -> Any:
    """`accumulate` of so many rows by so many vectors: their sums are that many registers.

    Args:
        resumed: whether sums go on from what is in `out`; else they begin at 0.
    """

    @intrinsic
    def accumulate(typingctx, x, x_stride, length, panel, line, gap, out, out_stride):
        """Rows of x [rows, length] times a panel [length, vectors, 16] -> float32 out [rows, vectors * 16].

        Every sum takes the inputs in their order. Values of x have four bytes; x_stride, out_stride: bytes from row to
        row; line, gap: bytes of the panel from input to input, and from vector to vector.
        """
        given = (x, x_stride, length, panel, line, gap, out, out_stride)

        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            cast = [context.cast(builder, v, of, types.int64) for v, of in zip(values, given, strict=True)]
            _emit(builder, rows, vectors, read, times, resumed, *cast)
            return context.get_dummy_value()

        return types.void(*given), codegen

    return accumulate


def _emit(
    b: ir.IRBuilder, rows: int, vectors: int, read: Read, times: Times, resumed: bool,
    x: Any, x_stride: Any, length: Any, panel: Any, line: Any, gap: Any, out: Any, out_stride: Any,
) -> None:  # fmt: skip
    def steps(step: Any, n: int) -> list[Any]:
        return [b.mul(step, ir.Constant(step.type, k)) for k in range(n)]

    outs = [[b.add(b.add(out, row), ir.Constant(out.type, VECTOR * v)) for v in range(vectors)]
            for row in steps(out_stride, rows)]  # fmt: skip
    sums = [[cgutils.alloca_once_value(b, read_lanes(b, at) if resumed else ZERO) for at in row] for row in outs]
    places, row_starts = steps(gap, vectors), steps(x_stride, rows)
    with cgutils.for_range(b, length) as loop:
        at = b.add(panel, b.mul(line, loop.index))
        weights = [read(b, b.add(at, place)) for place in places]
        from_x = b.add(x, b.mul(ir.Constant(x.type, 4), loop.index))
        for start, row in zip(row_starts, sums, strict=True):
            value = splat_at(b, b.add(from_x, start))
            for weight, total in zip(weights, row, strict=True):
                b.store(times(b, weight, value, b.load(total)), total)
    for row, places_of in zip(sums, outs, strict=True):
        for total, place in zip(row, places_of, strict=True):
            write_lanes(b, place, b.load(total))


def sums_in_registers() -> int:
    """How many vectors of sixteen sums the registers of this processor hold, beside what else a block needs."""
    return 24 if llvm.get_host_cpu_features().get("avx512f", False) else 6


def by_blocks(vectors: int, read: Read, times: Times, resumed: bool = False) -> Callable[..., Any]:
    """`accumulate` of any number of rows, in blocks of six rows, four, two and one.

    Args:
        vectors: 4, 2 or 1.
    """
    six, four, two, one = (_of_rows(rows, vectors, read, times, resumed) for rows in (6, 4, 2, 1))

    # Inlined, strides are constants where the caller has them so: a row alone is up to a fifth faster.
    @njit(inline="always")
    def accumulate(x, n, x_stride, length, panel, line, gap, out, out_stride):
        r = 0
        while r + 6 <= n:
            six(x + r * x_stride, x_stride, length, panel, line, gap, out + r * out_stride, out_stride)
            r += 6
        if r + 4 <= n:
            four(x + r * x_stride, x_stride, length, panel, line, gap, out + r * out_stride, out_stride)
            r += 4
        if r + 2 <= n:
            two(x + r * x_stride, x_stride, length, panel, line, gap, out + r * out_stride, out_stride)
            r += 2
        if r < n:
            one(x + r * x_stride, x_stride, length, panel, line, gap, out + r * out_stride, out_stride)

    return accumulate


def _of_rows(rows: int, vectors: int, read: Read, times: Times, resumed: bool) -> Callable[..., Any]:
    """`accumulate` of so many rows: a block, or one beside the other where registers do not hold that many sums."""
    width = vectors
    while width > 1 and rows * width > sums_in_registers():
        width //= 2
    part = block(rows, width, read, times, resumed)

    @njit(inline="always")
    def accumulate(x, x_stride, length, panel, line, gap, out, out_stride):
        for v in range(0, vectors, width):
            part(x, x_stride, length, panel + v * gap, line, gap, out + VECTOR * v, out_stride)

    return accumulate
