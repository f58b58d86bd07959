"""Products whose bits do not depend on the number of rows: one Triton kernel, fixed tiles, one order over the inputs.

cuBLAS chooses its kernel, and with it the order of a sum, by the number of rows; exact mode cannot use it. Here every
output adds its inputs in blocks of `BLOCK` from the first to the last, whatever the tile; there is no split over the
inputs. Several products of one shape, each with its own rows and its own weight, are one launch (Triton's grouped
product is the pattern).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_launch import current_stream
from moempi.device.cuda_transfer import to_device


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
_UNIT = 16  # bytes: offsets are counted in these where all rows are aligned to them, so that loads are wide


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


class Sections(NamedTuple):
    """P times R rows that meet one weight: [R, I] at an offset of one tensor, [R, O] at one of another; [P] int64."""

    weights: np.ndarray  # places in the stack of weights
    rows: np.ndarray  # R, at least 1
    sources: np.ndarray  # offsets in elements
    targets: np.ndarray


class Grouped(NamedTuple):
    """For every section, its rows [R, I] of `source` times its weight.T into its rows [R, O] of `target`.

    Args:
        source, target: flat views of the memory that the sections' offsets count in.
        weights: [S, O, I] contiguous.
    """

    source: Tensor
    weights: Tensor
    target: Tensor
    sections: Sections


def prepare(products: Sequence[Grouped]) -> list[Callable[[], None]]:
    """What launches each of the products, on the current stream; their tables go to the GPU in one copy."""
    tables, launches, begin = [], [], 0
    for source, weights, target, sections in products:
        outputs, inputs = weights.shape[1:]
        tile = tile_for(weights.dtype, int(sections.rows.max()))
        units = _units(source, inputs, sections.sources), _units(target, outputs, sections.targets)
        tables.append(tile_table(sections, tile.rows, inputs, outputs, *units))
        launches.append((source.data_ptr(), weights, target.data_ptr(), begin, len(tables[-1]), tile, units))
        begin += tables[-1].nbytes
    on_gpu = to_device(torch.from_numpy(np.concatenate(tables)), products[0].weights.device)

    def launch(source: int, weights: Tensor, target: int, table: int, n: int, tile: Tile, units: Units) -> None:
        _launch(source, weights, target, on_gpu.data_ptr() + table, 0, n, tile, *units)

    return [partial(launch, *arguments) for arguments in launches]


def grouped_product(source: Tensor, weights: Tensor, target: Tensor, sections: Sections) -> None:
    """One grouped product by itself."""
    prepare([Grouped(source, weights, target, sections)])[0]()


def tile_table(
    sections: Sections, tile_rows: int, inputs: int, outputs: int, in_unit: int, out_unit: int
) -> np.ndarray:
    """int64 [tiles, 4]: rows that are left, offset of the rows, weight, offset of the outputs; offsets in units."""
    weights, rows, sources, targets = sections
    tiles = -(-rows // tile_rows)
    owner = np.repeat(np.arange(len(rows)), tiles)
    begin = (np.arange(len(owner)) - (tiles.cumsum() - tiles)[owner]) * tile_rows
    table = np.empty((len(owner), 4), dtype=np.int64)
    table[:, 0] = rows[owner] - begin
    table[:, 1] = (sources[owner] + begin * inputs) // in_unit
    table[:, 2] = weights[owner]
    table[:, 3] = (targets[owner] + begin * outputs) // out_unit
    return table


def tile_for(dtype: torch.dtype, rows: int) -> Tile:
    """The tile for a product of so many rows."""
    return TILES[dtype][bisect_left(STEPS, rows)]


def _units(memory: Tensor, row: int, offsets: np.ndarray) -> int:
    unit = _UNIT // memory.dtype.itemsize
    aligned = memory.data_ptr() % _UNIT == 0 and row % unit == 0 and not (offsets % unit).any()
    return unit if aligned else 1


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
    aligned = (source % _UNIT == 0, addresses[1] % _UNIT == 0, target % _UNIT == 0)
    kernel, constants = _compiled(weights.dtype, aligned, table is None, outputs, inputs, tile, in_unit, out_unit)
    grid = (tiles * -(-outputs // tile.outputs), 1, 1)
    kernel[grid](*addresses, table, rows, outputs, inputs, *constants, stream=current_stream())


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
) -> tuple[Any, tuple[int | bool, ...]]:
    """The kernel for products of a kind, with its constants: Triton's own search for it takes longer than a launch."""
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
    pointers = [_Pointer(dtype, 0 if wide else dtype.itemsize) for wide in aligned]
    table = None if single else _Pointer(torch.int64, 0)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    kernel = _product.warmup(*pointers, table, 2, outputs, inputs, **constants, **options, grid=(1,))
    return kernel, tuple(constants.values())


class _Pointer:
    """What Triton asks of a tensor in order to compile for it."""

    def __init__(self, dtype: torch.dtype, address: int):
        self.dtype, self._address = dtype, address

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return 0
