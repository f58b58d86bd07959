"""Which tiles a product on the GPU is divided into: a decision about numbers of rows, outputs and weights."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows and outputs of a tile, inputs of a block, and how a multiprocessor works on it."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


# The smaller first. All tiles of a dtype give the same bits (the self-test looks): a tile decides who computes an
# output, not in which order.
TILES = {
    torch.bfloat16: (
        Tile(64, 64, 64, 4, 5),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 256, 64, 8, 3),
    ),
    torch.float32: (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
}
NARROW = 128  # outputs, of the widest tile that rows side by side take: wider ones took 10 to 30 % longer
ENOUGH = 132  # tiles, for an H200 to be busy with


@lru_cache(maxsize=4096)
def tile_for(dtype: torch.dtype, rows: int, outputs: int, weights: int | None = None) -> Tile:
    """The tile for products of rows with outputs: the largest that is filled and that there are enough of.

    Few large tiles leave the GPU idle; many small ones read weights and rows again and again.

    Args:
        rows: of each weight.
        weights: whose rows are gathered; None for one weight, whose rows lie side by side.
    """
    least, *larger = TILES[dtype]
    for tile in reversed(larger):
        filled = 2 * rows > tile.rows or tile.rows == least.rows
        tiles = -(-rows // tile.rows) * -(-outputs // tile.outputs) * (weights or 1)
        if filled and tiles >= ENOUGH and (weights or tile.outputs <= NARROW):
            return tile
    return least
