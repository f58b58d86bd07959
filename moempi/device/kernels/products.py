"""Products with packed weights, and experts made of them.

A weight [O, I] is packed as panels [O / 16, I, 16] of E, zero padded; every output is one sum over the inputs in
their order, by fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from moempi.device.kernels.elements import Elements, put_float, silu
from moempi.device.kernels.lanes import add, fused, load, multiply, read_float, read_int, splat, store

ROWS = 4  # of a block


def times_four(e: Elements) -> Callable[..., Any]:
    """A block of four rows."""
    panel, get_all = 16 * e.size, e.get_all

    @njit
    def four_rows(x, inputs, stride, weight, panels, out, out_stride):
        """Four rows of float32 times a packed weight -> float32 rows."""
        for p in range(panels):
            w = weight + p * inputs * panel
            a = splat(0.0)
            b = splat(0.0)
            c = splat(0.0)
            d = splat(0.0)
            for i in range(inputs):
                v = get_all(w + panel * i)
                at = x + 4 * i
                a = fused(v, splat(read_float(at)), a)
                b = fused(v, splat(read_float(at + 4 * stride)), b)
                c = fused(v, splat(read_float(at + 8 * stride)), c)
                d = fused(v, splat(read_float(at + 12 * stride)), d)
            to = out + 64 * p
            store(to, a)
            store(to + 4 * out_stride, b)
            store(to + 8 * out_stride, c)
            store(to + 12 * out_stride, d)

    return four_rows


def times_one(e: Elements) -> Callable[..., Any]:
    """What does not fill a block."""
    panel, get_all = 16 * e.size, e.get_all

    @njit
    def one_row(x, inputs, weight, panels, out):
        """The same for one row: four panels at a time, so that additions need not wait for each other."""
        whole_panel = inputs * panel
        whole = panels // 4 * 4
        for p in range(0, whole, 4):
            w = weight + p * whole_panel
            a = splat(0.0)
            b = splat(0.0)
            c = splat(0.0)
            d = splat(0.0)
            for i in range(inputs):
                v = splat(read_float(x + 4 * i))
                at = w + panel * i
                a = fused(get_all(at), v, a)
                b = fused(get_all(at + whole_panel), v, b)
                c = fused(get_all(at + 2 * whole_panel), v, c)
                d = fused(get_all(at + 3 * whole_panel), v, d)
            store(out + 64 * p, a)
            store(out + 64 * (p + 1), b)
            store(out + 64 * (p + 2), c)
            store(out + 64 * (p + 3), d)
        for p in range(whole, panels):
            a = splat(0.0)
            for i in range(inputs):
                a = fused(get_all(weight + p * whole_panel + panel * i), splat(read_float(x + 4 * i)), a)
            store(out + 64 * p, a)

    return one_row


def times(e: Elements) -> Callable[..., Any]:
    """Rows of float32 times a packed weight of E."""
    four_rows, one_row = times_four(e), times_one(e)

    @njit
    def rows_times(x, n, inputs, stride, weight, panels, out, out_stride):
        """Up to four rows."""
        if n == ROWS:
            four_rows(x, inputs, stride, weight, panels, out, out_stride)
        else:
            for r in range(n):
                one_row(x + 4 * r * stride, inputs, weight, panels, out + 4 * r * out_stride)

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
