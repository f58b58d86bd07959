"""Products whose bits do not depend on the number of rows: one Triton kernel, fixed tiles, one order over the inputs.

cuBLAS chooses its kernel, and with it the order of a sum, by the number of rows; exact mode cannot use it. Here every
output adds its inputs in blocks of `BLOCK` from the first to the last, whatever the tile; there is no split over the
inputs. Several products of one shape, each with its own rows and its own weight, are one launch (Triton's grouped
product is the pattern).
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_triton import WIDE, Compiled, compiled


class Tile(NamedTuple):
    """Rows and outputs of a tile, inputs of a block, and how a multiprocessor works on it."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


# With few rows a product is bound by reading its weights, and many small tiles read them faster. All tiles of a dtype
# give the same bits (the self-test looks): a tile decides who computes an output, not in which order.
TILES = {
    torch.bfloat16: (Tile(64, 64, 64, 4, 5), Tile(128, 128, 64, 8, 4), Tile(256, 128, 64, 8, 3)),
    torch.float32: (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
}
STEPS = (256, 768)  # rows up to which the first and the second tile are taken
_GROUP = 8  # tiles of rows that share a weight's tile in the cache
Units = tuple[int, int]  # elements in which offsets of rows and of outputs are counted


@triton.jit(do_not_specialize=["n_rows"])  # a kernel for every number of rows would be compiled while a job runs
def _product(  # type: ignore[no-untyped-def]
    rows_base,
    weights,
    out_base,
    table,
    n_rows,
    n_outputs,
    n_inputs,
    IN_UNIT: tl.constexpr,  # noqa: N803
    OUT_UNIT: tl.constexpr,  # noqa: N803
    SINGLE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    EVEN: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    # Neighbouring programs share tiles of rows and of weights.
    pid = tl.program_id(0)
    across = tl.cdiv(n_outputs, OUTPUTS)
    down = tl.num_programs(0) // across
    first = pid // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    m = first + pid % (GROUP * across) % height
    n = pid % (GROUP * across) // height
    if SINGLE:
        left = n_rows - m * ROWS
        x = rows_base + m.to(tl.int64) * ROWS * n_inputs
        w = weights
        y = out_base + m.to(tl.int64) * ROWS * n_outputs
    else:
        left = tl.load(table + 4 * m).to(tl.int32)
        if left == 0:
            return
        x = rows_base + tl.load(table + 4 * m + 1) * IN_UNIT
        w = weights + tl.load(table + 4 * m + 2) * n_outputs * n_inputs
        y = out_base + tl.load(table + 4 * m + 3) * OUT_UNIT
    # What lies beyond the last row or output is computed from another one and not stored.
    row = tl.arange(0, ROWS)
    output = n * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, BLOCK)
    from_x = x + tl.minimum(row, left - 1)[:, None] * n_inputs + inputs[None, :]
    from_w = w + tl.minimum(output, n_outputs - 1).to(tl.int64)[None, :] * n_inputs + inputs[:, None]
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for begin in range(0, n_inputs, BLOCK):
        if EVEN:
            a = tl.load(from_x)
            b = tl.load(from_w)
        else:
            a = tl.load(from_x, mask=inputs[None, :] < n_inputs - begin, other=0.0)
            b = tl.load(from_w, mask=inputs[:, None] < n_inputs - begin, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        from_x += BLOCK
        from_w += BLOCK
    mask = (row[:, None] < left) & (output[None, :] < n_outputs)
    tl.store(y + row.to(tl.int64)[:, None] * n_outputs + output[None, :], total.to(y.dtype.element_ty), mask=mask)


def product(x: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """x [R, I] @ weight [O, I].T -> [R, O], in the weight's dtype, for any R; all contiguous.

    Args:
        tile: for tests; by default what suits the number of rows.
    """
    out = torch.empty(x.shape[0], weight.shape[0], dtype=weight.dtype, device=weight.device)
    product_at(x.data_ptr(), x.shape[0], weight, out.data_ptr(), tile)
    return out


def product_at(source: int, rows: int, weight: Tensor, target: int, tile: Tile | None = None) -> None:
    """The product of rows [R, I] at one address into [R, O] at another, both in the weight's dtype."""
    if rows:
        tile = tile or tile_for(weight.dtype, rows)
        _launch(source, weight, target, None, rows, -(-rows // tile.rows), tile, 1, 1)


def product_by_tiles(
    source: int, weights: Tensor, target: int, table: int, tiles: int, tile: Tile, units: Units
) -> None:
    """For every tile of rows, [R, I] of one memory, their product with one of the weights into [R, O] of another.

    Args:
        source, target: addresses of the memories.
        weights: [S, O, I] contiguous.
        table: address of int64 [tiles, 4] on the GPU: rows that are left of a part from here on (0: an empty tile),
            where they begin, which weight, where their outputs begin.
        units: elements in which the table counts in `source` and in `target`; all begins are multiples of 16 bytes
            where a unit is.
    """
    _launch(source, weights, target, table, 0, tiles, tile, *units)


def tile_for(dtype: torch.dtype, rows: int) -> Tile:
    """The tile for a product of so many rows."""
    return TILES[dtype][bisect_left(STEPS, rows)]


def unit_of(row: int, dtype: torch.dtype) -> int:
    """Elements of 16 bytes where rows of so many elements are whole numbers of them, so that loads are wide; else 1."""
    unit = WIDE // dtype.itemsize
    return unit if row % unit == 0 else 1


def _launch(
    source: int,
    weights: Tensor,
    target: int,
    table: int | None,
    rows: int,
    tiles: int,
    tile: Tile,
    in_unit: int,
    out_unit: int,
) -> None:
    outputs, inputs = weights.shape[-2:]
    addresses = source, weights.data_ptr(), target
    aligned = (source % WIDE == 0, addresses[1] % WIDE == 0, target % WIDE == 0)
    kernel = _compiled(weights.dtype, aligned, table is None, outputs, inputs, tile, in_unit, out_unit)
    kernel((tiles * -(-outputs // tile.outputs), 1, 1), *addresses, table, rows, outputs, inputs)


@cache
def _compiled(
    dtype: torch.dtype,
    aligned: tuple[bool, bool, bool],
    single: bool,
    outputs: int,
    inputs: int,
    tile: Tile,
    in_unit: int,
    out_unit: int,
) -> Compiled:
    """The kernel for products of a kind."""
    constants = {
        "IN_UNIT": in_unit,
        "OUT_UNIT": out_unit,
        "SINGLE": single,
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "BLOCK": tile.inputs,
        "EVEN": inputs % tile.inputs == 0,
        "GROUP": _GROUP,
    }
    pointers = [*((dtype, wide) for wide in aligned), None if single else (torch.int64, True)]
    numbers = 2, outputs, inputs
    return compiled(_product, pointers, numbers, constants, num_warps=tile.warps, num_stages=tile.stages)
