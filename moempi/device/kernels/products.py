"""Products with packed weights, and experts made of them.

A weight [O, I] is packed as panels [O / 16, I, 16] of E, zero padded; every output is one sum over the inputs in
their order, by fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from moempi.device.kernels import ROWS
from moempi.device.kernels.blocks import by_blocks
from moempi.device.kernels.elements import Elements, put_float, silu
from moempi.device.kernels.lanes import LANES, VECTOR, add, load, multiply, multiply_add, read_int, store


def times(e: Elements) -> Callable[..., Any]:
    """Rows of float32 times a packed weight of E."""
    size = LANES * e.size
    times_four, times_one = (by_blocks(panels, e.read, multiply_add) for panels in (4, 1))

    @njit
    def rows_times(x, n, inputs, stride, weight, panels, out, out_stride):
        """n rows, `stride` values apart -> float32 rows, `out_stride` apart; four panels at a time."""
        panel = inputs * size
        whole = panels // 4 * 4
        for p in range(0, whole, 4):
            times_four(x, n, 4 * stride, inputs, weight + p * panel, size, panel, out + VECTOR * p, 4 * out_stride)
        for p in range(whole, panels):
            times_one(x, n, 4 * stride, inputs, weight + p * panel, size, panel, out + VECTOR * p, 4 * out_stride)

    return rows_times


@njit
def multiply_gates(gates, ups, count):
    """silu(gate) * up, in place of the gates; float32, a multiple of sixteen."""
    for i in range(0, count, 16):
        store(gates + 4 * i, multiply(silu(load(gates + 4 * i)), load(ups + 4 * i)))


def to_float(e: Elements) -> Callable[..., Any]:
    """Values of E -> float32."""
    size, get = e.size, e.get

    @njit
    def widen(x, count, out):
        for i in range(0, count, 16):
            put_float(out + 4 * i, get(x + size * i, count - i), count - i)

    return widen


def build_product(e: Elements) -> Callable[..., None]:
    """The kernel of a product."""
    size, get, put, widen, rows_times = e.size, e.get, e.put, to_float(e), times(e)

    def product(x, n, inputs, weight, outputs, out, residual, scratch):
        """Rows [n, inputs] of E times a packed weight -> E; `residual` of E is added if not 0.

        scratch: float32, 4 * (inputs + outputs padded to 16).
        """
        panels = (outputs + 15) // 16
        wide = 16 * panels
        sums = scratch + 4 * ROWS * inputs
        for t in range(0, n, ROWS):
            rows = min(ROWS, n - t)
            widen(x + size * t * inputs, rows * inputs, scratch)
            rows_times(scratch, rows, inputs, inputs, weight, panels, sums, wide)
            for r in range(rows):
                for o in range(0, outputs, 16):
                    v = load(sums + 4 * (r * wide + o))
                    at = (t + r) * outputs + o
                    if residual != 0:
                        v = add(v, get(residual + size * at, outputs - o))
                    put(out + size * at, v, outputs - o)

    return product


def build_experts(e: Elements) -> Callable[..., None]:
    """The kernel of SwiGLU experts (Shazeer, 2020)."""
    size, put, widen, rows_times = e.size, e.put, to_float(e), times(e)

    def experts(table, n, d, hidden, out_is_float, scratch):
        """SwiGLU experts on n batches of rows. A line of `table`: rows, answers, row count, gate, up and down weights.

        scratch: float32, 4 * (2 * d + 2 * hidden, each padded to 16).
        """
        panels = (hidden + 15) // 16
        wide = 16 * panels
        out_panels = (d + 15) // 16
        gates = scratch + 4 * ROWS * d
        ups = gates + 4 * ROWS * wide
        sums = ups + 4 * ROWS * wide
        for line in range(n):
            at = table + 48 * line
            x, out, count = read_int(at), read_int(at + 8), read_int(at + 16)
            gate, up, down = read_int(at + 24), read_int(at + 32), read_int(at + 40)
            for t in range(0, count, ROWS):
                rows = min(ROWS, count - t)
                widen(x + size * t * d, rows * d, scratch)
                rows_times(scratch, rows, d, d, gate, panels, gates, wide)
                rows_times(scratch, rows, d, d, up, panels, ups, wide)
                multiply_gates(gates, ups, rows * wide)
                rows_times(gates, rows, hidden, wide, down, out_panels, sums, 16 * out_panels)
                for r in range(rows):
                    for o in range(0, d, 16):
                        v = load(sums + 4 * (r * 16 * out_panels + o))
                        if out_is_float != 0:
                            put_float(out + 4 * ((t + r) * d + o), v, d - o)
                        else:
                            put(out + size * ((t + r) * d + o), v, d - o)

    return experts
