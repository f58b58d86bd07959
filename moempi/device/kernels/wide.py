"""Products with weights that no cache holds: bound by reading them where rows are few, by arithmetic where many are.

A weight [O, I] is packed as panels of 64 outputs, zero padded, so that it is read as one stream: [O / 64, I, 64] of
float32, or [O / 64, I / 2, 64, 2] of bfloat16, whose instruction takes pairs of inputs. Every output is one sum over
the inputs (the pairs) in their order, by fused multiply-adds (by that instruction). The block that computes it depends
on the number of rows, its bits do not.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import types

from moempi.device.kernels import PANEL, TILE
from moempi.device.kernels.blocks import by_blocks
from moempi.device.kernels.elements import Elements
from moempi.device.kernels.lanes import LANES, VECTOR, dot_pairs, load, multiply_add, read_lanes, write_float

LINE = PANEL // LANES * VECTOR  # bytes that a panel has for one input (or pair), and of a row's sums with it


def build_wide_product(e: Elements) -> Callable[..., None]:
    """The kernel of a product with a large weight."""
    size, put, copy = e.size, e.put, e.copy
    times_panel = by_blocks(PANEL // LANES, read_lanes, dot_pairs if size == 2 else multiply_add)

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
                times_panel(source, rows, 4 * length, length, panel, LINE, VECTOR, sums, LINE)
                begin = PANEL * p
                for r in range(rows):
                    for o in range(begin, min(begin + PANEL, outputs), 16):
                        value = load(sums + LINE * r + 4 * (o - begin))
                        put(out + size * ((t + r) * outputs + o), value, outputs - o)

    return wide_product
