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

from moempi.device.kernels.elements import Elements
from moempi.device.kernels.lanes import dot_pairs, fused, load, read_float, splat, store, write_float

OUTPUTS = 64  # of a panel: four vectors
TILE = 64  # rows that are taken through a panel while it is in the cache


def times_panel(pairs: bool) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Four rows [R, length], two, and one times a panel [length, OUTPUTS] -> float32 [R, OUTPUTS].

    Args:
        pairs: of bfloat16 are what a row and a panel have `length` of; else it is float32.
    """
    times = dot_pairs if pairs else fused

    @njit
    def four(x, length, panel, out):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(0.0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = splat(0.0)
        for i in range(length):
            at = panel + 256 * i
            w0, w1, w2, w3 = load(at), load(at + 64), load(at + 128), load(at + 192)
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
        keep(out + 256, b0, b1, b2, b3)
        keep(out + 512, c0, c1, c2, c3)
        keep(out + 768, d0, d1, d2, d3)

    @njit
    def two(x, length, panel, out):
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(0.0)
        for i in range(length):
            at = panel + 256 * i
            w0, w1, w2, w3 = load(at), load(at + 64), load(at + 128), load(at + 192)
            v = splat(read_float(x + 4 * i))
            a0, a1, a2, a3 = times(w0, v, a0), times(w1, v, a1), times(w2, v, a2), times(w3, v, a3)
            v = splat(read_float(x + 4 * i + 4 * length))
            b0, b1, b2, b3 = times(w0, v, b0), times(w1, v, b1), times(w2, v, b2), times(w3, v, b3)
        keep(out, a0, a1, a2, a3)
        keep(out + 256, b0, b1, b2, b3)

    @njit
    def one(x, length, panel, out):
        a0 = a1 = a2 = a3 = splat(0.0)
        for i in range(length):
            at = panel + 256 * i
            v = splat(read_float(x + 4 * i))
            a0, a1 = times(load(at), v, a0), times(load(at + 64), v, a1)
            a2, a3 = times(load(at + 128), v, a2), times(load(at + 192), v, a3)
        keep(out, a0, a1, a2, a3)

    return four, two, one


@njit
def keep(out, a, b, c, d):
    """One row of a panel's outputs."""
    store(out, a)
    store(out + 64, b)
    store(out + 128, c)
    store(out + 192, d)


def build_wide_product(e: Elements) -> Callable[..., None]:
    """The kernel of a product with a large weight."""
    size, put, copy = e.size, e.put, e.copy
    four, two, one = times_panel(pairs=size == 2)

    def wide_product(x, n, inputs, weight, outputs, first, last, out, scratch):
        """Rows [n, inputs] of E times panels [first, last) of a packed weight -> their columns of [n, outputs] of E.

        scratch: float32, TILE * (inputs + 1 + OUTPUTS).
        """
        length = (inputs * size + 3) // 4
        sums = scratch + 4 * TILE * length
        for t in range(0, n, TILE):
            rows = min(TILE, n - t)
            source = x + size * t * inputs
            if 4 * length != size * inputs:  # the last pair of every row has one input: the other one is 0
                source = scratch
                for r in range(rows):
                    write_float(scratch + 4 * (r * length + length - 1), types.float32(0.0))
                    for i in range(inputs):
                        copy(scratch + 4 * r * length + size * i, x + size * ((t + r) * inputs + i))
            for p in range(first, last):
                panel = weight + p * 256 * length
                r = 0
                while r + 4 <= rows:
                    four(source + 4 * r * length, length, panel, sums + 256 * r)
                    r += 4
                if r + 2 <= rows:
                    two(source + 4 * r * length, length, panel, sums + 256 * r)
                    r += 2
                if r < rows:
                    one(source + 4 * r * length, length, panel, sums + 256 * r)
                begin = OUTPUTS * p
                for r in range(rows):
                    for o in range(begin, min(begin + OUTPUTS, outputs), 16):
                        value = load(sums + 256 * r + 4 * (o - begin))
                        put(out + size * ((t + r) * outputs + o), value, outputs - o)

    return wide_product
