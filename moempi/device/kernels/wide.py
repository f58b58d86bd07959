"""Products with weights that no cache holds: bound by reading them where rows are few, by arithmetic where many are.

A weight [O, I] is packed as panels of 64 outputs, zero padded, so that it is read as one stream: [O / 64, I, 64] of
float32, or [O / 64, I / 2, 64, 2] of bfloat16, whose instruction takes pairs of inputs. Every output is one sum over
the inputs (the pairs) in their order, by fused multiply-adds (by that instruction). The block that computes it depends
on the number of rows, its bits do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types

from moempi.device.kernels import PANEL, TILE
from moempi.device.kernels.elements import Elements
from moempi.device.kernels.lanes import dot_pairs, fused, load, read_float, splat, store, write_float

VECTOR = 64  # bytes; four are a line: what a panel has for one input (or pair), and the sums of a row with a panel
LINE = 4 * VECTOR


def times_panel(pairs: bool) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Four rows [R, length], two, and one times a panel [length, PANEL] -> float32 [R, PANEL].

    Args:
        pairs: of bfloat16 are what a row and a panel have `length` of; else it is float32.
    """
    times = dot_pairs if pairs else fused

    @njit
    def four(x, length, panel, out):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(0.0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = splat(0.0)
        for i in range(length):
            at = panel + LINE * i
            w0, w1, w2, w3 = load(at), load(at + VECTOR), load(at + 2 * VECTOR), load(at + 3 * VECTOR)
            from_x = x + 4 * i
            v = splat(read_float(from_x))
            a0, a1, a2, a3 = times(w0, v, a0), times(w1, v, a1), times(w2, v, a2), times(w3, v, a3)
            v = splat(read_float(from_x + 4 * length))
            b0, b1, b2, b3 = times(w0, v, b0), times(w1, v, b1), times(w2, v, b2), times(w3, v, b3)
            v = splat(read_float(from_x + 8 * length))
            c0, c1, c2, c3 = times(w0, v, c0), times(w1, v, c1), times(w2, v, c2), times(w3, v, c3)
            v = splat(read_float(from_x + 12 * length))
            d0, d1, d2, d3 = times(w0, v, d0), times(w1, v, d1), times(w2, v, d2), times(w3, v, d3)
        keep(out, a0, a1, a2, a3)
        keep(out + LINE, b0, b1, b2, b3)
        keep(out + 2 * LINE, c0, c1, c2, c3)
        keep(out + 3 * LINE, d0, d1, d2, d3)

    @njit
    def two(x, length, panel, out):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(0.0)
        for i in range(length):
            at = panel + LINE * i
            w0, w1, w2, w3 = load(at), load(at + VECTOR), load(at + 2 * VECTOR), load(at + 3 * VECTOR)
            v = splat(read_float(x + 4 * i))
            a0, a1, a2, a3 = times(w0, v, a0), times(w1, v, a1), times(w2, v, a2), times(w3, v, a3)
            v = splat(read_float(x + 4 * i + 4 * length))
            b0, b1, b2, b3 = times(w0, v, b0), times(w1, v, b1), times(w2, v, b2), times(w3, v, b3)
        keep(out, a0, a1, a2, a3)
        keep(out + LINE, b0, b1, b2, b3)

    @njit
    def one(x, length, panel, out):
        a0 = a1 = a2 = a3 = splat(0.0)
        for i in range(length):
            at = panel + LINE * i
            v = splat(read_float(x + 4 * i))
            a0, a1 = times(load(at), v, a0), times(load(at + VECTOR), v, a1)
            a2, a3 = times(load(at + 2 * VECTOR), v, a2), times(load(at + 3 * VECTOR), v, a3)
        keep(out, a0, a1, a2, a3)

    return four, two, one


@njit
def keep(out, a, b, c, d):
    """One row of a panel's outputs."""
    store(out, a)
    store(out + VECTOR, b)
    store(out + 2 * VECTOR, c)
    store(out + 3 * VECTOR, d)


def build_wide_product(e: Elements) -> Callable[..., None]:
    """The kernel of a product with a large weight."""
    size, put, copy = e.size, e.put, e.copy
    four, two, one = times_panel(pairs=size == 2)

    def wide_product(x, n, inputs, weight, outputs, first, last, out, scratch):
        """Rows [n, inputs] of E times panels [first, last) of a packed weight -> their columns of [n, outputs] of E.

        scratch: float32, TILE * PANEL; for odd rows of bfloat16 TILE * (inputs + 1) more.
        """
        length = (inputs * size + 3) // 4
        sums, copies = scratch, scratch + TILE * LINE
        for t in range(0, n, TILE):
            rows = min(TILE, n - t)
            source = x + size * t * inputs
            if 4 * length != size * inputs:  # the last pair of every row has one input: the other one is 0
                source = copies
                for r in range(rows):
                    write_float(copies + 4 * (r * length + length - 1), types.float32(0.0))
                    for i in range(inputs):
                        copy(copies + 4 * r * length + size * i, x + size * ((t + r) * inputs + i))
            for p in range(first, last):
                panel = weight + p * LINE * length
                r = 0
                while r + 4 <= rows:
                    four(source + 4 * r * length, length, panel, sums + LINE * r)
                    r += 4
                if r + 2 <= rows:
                    two(source + 4 * r * length, length, panel, sums + LINE * r)
                    r += 2
                if r < rows:
                    one(source + 4 * r * length, length, panel, sums + LINE * r)
                begin = PANEL * p
                for r in range(rows):
                    for o in range(begin, min(begin + PANEL, outputs), 16):
                        value = load(sums + LINE * r + 4 * (o - begin))
                        put(out + size * ((t + r) * outputs + o), value, outputs - o)

    return wide_product
