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


THIN = Tile(32, 128, 64, 4, 5)
MIDDLE = Tile(64, 128, 64, 4, 4)
LEAN = MIDDLE._replace(stages=3)
_LADDER = {  # the smaller first
    torch.bfloat16: (Tile(64, 64, 64, 4, 5), MIDDLE, Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
    torch.float32: (Tile(16, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)),
}
# All tiles of a dtype give the same bits (the self-test looks): a tile decides who computes an output, not in which
# order.
TILES = {torch.bfloat16: (*_LADDER[torch.bfloat16], THIN, LEAN), torch.float32: _LADDER[torch.float32]}
NARROW = 128  # outputs, of the widest tile that rows side by side take: wider ones took 10 to 30 % longer
ENOUGH = 132  # tiles, for an H200 to be busy with: it has as many multiprocessors
# Rows of each of several weights, up to which a thin tile is best. They are an average, and weights with more rows than
# a tile are read twice: calls with 8 and 16 rows of a weight took 4 to 12 % less than with the middle tile, of those
# with 32 rows one took 17 % more.
FEW = 24


@lru_cache(maxsize=4096)
def tile_for(dtype: torch.dtype, rows: int, outputs: int, weights: int | None = None) -> Tile:
    """The tile for products of rows with outputs: the largest that is filled and that there are enough of.

    Few large tiles leave the GPU idle; many small ones read weights and rows again and again.

    Args:
        rows: of each weight.
        weights: whose rows are gathered; None for one weight, whose rows lie side by side.
    """

    def are_enough(tile: Tile) -> bool:
        return -(-rows // tile.rows) * -(-outputs // tile.outputs) * (weights or 1) >= ENOUGH

    if weights and rows <= FEW and THIN in TILES[dtype] and are_enough(THIN):
        return THIN
    least, *larger = _LADDER[dtype]
    for tile in reversed(larger):
        filled = 2 * rows > tile.rows or tile.rows == least.rows
        if filled and are_enough(tile) and (weights or tile.outputs <= NARROW):
            return tile
    return least


def with_room(tile: Tile, n: int) -> Tile:
    """The tile for some n of it: the middle one has a stage less where only so all have room at once.

    A multiprocessor has room for two, and with three stages for three: 384 tiles took 67 us with four stages, and 63
    with three. Where all had room as they were, or neither way, four were up to 15 % faster.
    """
    return LEAN if tile == MIDDLE and 2 * ENOUGH < n <= 3 * ENOUGH else tile
