"""Products whose bits do not depend on the number of rows: one Triton kernel, fixed tiles, one order over the inputs.

cuBLAS chooses its kernel, and with it the order of a sum, by the number of rows; exact mode cannot use it. Here every
output adds its inputs in blocks of `BLOCK` from the first to the last, whatever the tile; there is no split over the
inputs. Several products of one shape, each with its own rows and its own weight, are one launch (Triton's grouped
product is the pattern).
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_triton import WIDE, Compiled, compiled
from moempi.device.product_tiles import Tile, tile_for

_GROUP = 8  # tiles of rows that share a weight's tile in the cache


class Tiles(NamedTuple):
    """Rows for several weights, the rows of a weight beside each other; on the GPU.

    Args:
        tile: what the rows were divided into.
        n: tiles.
        table: address of int64 [n, 3]: rows that are left of a weight's from here on (0: an empty tile), which row of
            all it begins with, which weight.
        unit: elements in which `places` are counted.
    """

    tile: Tile
    n: int
    table: int
    unit: int


@triton.jit(do_not_specialize=["n_rows"])  # a kernel for every number of rows would be compiled while a job runs
def _product(  # type: ignore[no-untyped-def]
    rows_base,
    weights,
    out_base,
    table,
    places,
    n_rows,
    n_outputs,
    n_inputs,
    UNIT: tl.constexpr,  # noqa: N803
    WAY: tl.constexpr,  # noqa: N803
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
    if WAY == 0:
        left = n_rows - m * ROWS
        begin = m.to(tl.int64) * ROWS
        w = weights
    else:
        left = tl.load(table + 3 * m).to(tl.int32)
        if left == 0:
            return
        begin = tl.load(table + 3 * m + 1)
        w = weights + tl.load(table + 3 * m + 2) * n_outputs * n_inputs
    # What lies beyond the last row or output is computed from another one and not stored.
    row = tl.arange(0, ROWS)
    of_row = begin + tl.minimum(row, left - 1)
    output = n * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, BLOCK)
    x = tl.load(places + of_row) * UNIT if WAY == 1 else of_row * n_inputs
    from_x = rows_base + x[:, None] + inputs[None, :]
    from_w = w + tl.minimum(output, n_outputs - 1).to(tl.int64)[None, :] * n_inputs + inputs[:, None]
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for block in range(0, n_inputs, BLOCK):
        if EVEN:
            a = tl.load(from_x)
            b = tl.load(from_w)
        else:
            a = tl.load(from_x, mask=inputs[None, :] < n_inputs - block, other=0.0)
            b = tl.load(from_w, mask=inputs[:, None] < n_inputs - block, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        from_x += BLOCK
        from_w += BLOCK
    mask = (row[:, None] < left) & (output[None, :] < n_outputs)
    y = tl.load(places + of_row) * UNIT if WAY == 2 else of_row * n_outputs
    tl.store(out_base + y[:, None] + output[None, :], total.to(out_base.dtype.element_ty), mask=mask)


def product(x: Tensor, weight: Tensor, tile: Tile | None = None, out: torch.dtype | None = None) -> Tensor:
    """x [R, I] @ weight [O, I].T -> [R, O], for any R; all contiguous.

    Args:
        tile: for tests; by default what suits the number of rows.
        out: dtype of what comes out, by default the weight's.
    """
    result = torch.empty(x.shape[0], weight.shape[0], dtype=out or weight.dtype, device=weight.device)
    product_at(x.data_ptr(), x.shape[0], weight, result.data_ptr(), tile, out)
    return result


def product_at(
    source: int,
    rows: int,
    weight: Tensor,
    target: int,
    tile: Tile | None = None,
    out: torch.dtype | None = None,
) -> None:
    """The product of rows [R, I] at one address, in the weight's dtype, into [R, O] at another, by default too."""
    if rows:
        tile, out = tile or tile_for(weight.dtype, rows, weight.shape[0]), out or weight.dtype
        _launch(source, weight, target, Tiles(tile, -(-rows // tile.rows), 0, 1), _Way.ALONE, None, rows, out)


def product_gathered(source: int, weights: Tensor, target: int, tiles: Tiles, places: int) -> None:
    """Rows of one memory, each [I] times the weight of its tile, into rows [R, O] at an address, in the tiles' order.

    Args:
        source: address of the memory.
        weights: [S, O, I] contiguous.
        places: address of int64 [R]: where in the memory each row is; multiples of 16 bytes where the unit is.
    """
    _launch(source, weights, target, tiles, _Way.GATHER, places, 0, weights.dtype)


def product_scattered(source: int, weights: Tensor, target: int, tiles: Tiles, places: int) -> None:
    """The other way: rows [R, I] at an address, in the tiles' order, into rows [O] of the memory at `target`."""
    _launch(source, weights, target, tiles, _Way.SCATTER, places, 0, weights.dtype)


def unit_of(row: int, dtype: torch.dtype) -> int:
    """Elements of 16 bytes where rows of so many elements are whole numbers of them, so that loads are wide; else 1."""
    unit = WIDE // dtype.itemsize
    return unit if row % unit == 0 else 1


class _Way(IntEnum):
    """Where the rows of a product lie."""

    ALONE = 0  # side by side, for one weight
    GATHER = 1  # those that go in somewhere
    SCATTER = 2  # those that come out somewhere


def _launch(
    source: int,
    weights: Tensor,
    target: int,
    tiles: Tiles,
    way: _Way,
    places: int | None,
    rows: int,
    out: torch.dtype,
) -> None:
    outputs, inputs = weights.shape[-2:]
    addresses = source, weights.data_ptr(), target
    aligned = (source % WIDE == 0, addresses[1] % WIDE == 0, target % WIDE == 0)
    kernel = _compiled((weights.dtype, out), aligned, way, outputs, inputs, tiles.tile, tiles.unit)
    grid = (tiles.n * -(-outputs // tiles.tile.outputs), 1, 1)
    kernel(grid, *addresses, tiles.table or None, places, rows, outputs, inputs)


@cache
def _compiled(
    dtypes: tuple[torch.dtype, torch.dtype],
    aligned: tuple[bool, bool, bool],
    way: _Way,
    outputs: int,
    inputs: int,
    tile: Tile,
    unit: int,
) -> Compiled:
    """The kernel for products of a kind, of what goes in with the first dtype to what comes out with the second."""
    constants = {
        "UNIT": unit,
        "WAY": int(way),
        "ROWS": tile.rows,
        "OUTPUTS": tile.outputs,
        "BLOCK": tile.inputs,
        "EVEN": inputs % tile.inputs == 0,
        "GROUP": _GROUP,
    }
    tables = [None if way == _Way.ALONE else (torch.int64, True)] * 2
    pointers = [*zip((dtypes[0], *dtypes), aligned, strict=True), *tables]
    numbers = 2, outputs, inputs
    return compiled(_product, pointers, numbers, constants, num_warps=tile.warps, num_stages=tile.stages)
