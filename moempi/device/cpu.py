"""The CPU as a device: the products that exact mode stands on, and the test that they are what it needs.

A result must not depend on the layout, so the bits of a row may depend neither on how many rows travel
with it, nor on its place among them, nor on the number of threads. oneDNN products with packed weights
have this property for two rows and more; `F.linear` has not. The operators are private to torch: only
`_pack` and `_packed_product` here name them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.errors import MoempiError

TILE_ROWS = 16  # rows of a tile, and the multiple that features are padded to, where products are not packed
PACK_ROWS = 16  # the row count that oneDNN chooses its blocking for; part of the bits
SELF_TEST_ROWS = (2, 3, 5, 8, 17, 64, 67, 130)


class Linear:
    """`y = x @ weight.T`, the bits of every row depending on that row alone.

    Args:
        weight: [O, I], float32 or bfloat16; packed, so that the caller can drop it.
        packed: oneDNN with packed weights; else padded `F.linear` on tiles of 16 rows.
    """

    def __init__(self, weight: Tensor, *, packed: bool = True):
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.packed = packed
        self._weight = _pack(weight) if packed else _pad_features(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, I] -> [R, O], in the weight's dtype, for any R including 0."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0])
        return self._packed_rows(x) if self.packed else self._tiled_rows(x)

    def _packed_rows(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        wanted = padded_rows(rows)
        if wanted == rows:
            return _packed_product(x, self._weight)
        padded = x.new_zeros(wanted, x.shape[1])
        padded[:rows] = x
        return _packed_product(padded, self._weight)[:rows]

    def _tiled_rows(self, x: Tensor) -> Tensor:
        rows, features = x.shape
        padded = x.new_zeros(_up(rows), self._weight.shape[1])
        padded[:rows, :features] = x
        tiles = [F.linear(tile, self._weight) for tile in padded.split(TILE_ROWS)]
        return torch.cat(tiles)[:rows, : self.shape[0]]


def padded_rows(rows: int) -> int:
    """Rows that a packed product is called with: a lone row takes another kernel, so there are at least two.

    oneDNN compiles a kernel for every row count that it meets, which takes 0.7 ms; a batch that shrinks and grows
    would meet hundreds. Padding to a few counts costs less, and the bits of a row do not change.
    """
    if rows <= TILE_ROWS:
        return max(2, 1 << (rows - 1).bit_length())
    step = TILE_ROWS if rows <= 256 else 64
    return -(-rows // step) * step


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)


def _packed_product(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _pad_features(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    return F.pad(weight, (0, _up(inputs) - inputs, 0, _up(outputs) - outputs)).contiguous()


def _up(n: int) -> int:
    return -(-n // TILE_ROWS) * TILE_ROWS


class Cpu:
    """Products on the CPU, and whether they passed their self-test.

    Args:
        threads: torch threads of this rank.
    """

    name = "cpu"

    def __init__(self, threads: int = 1):
        self.threads = threads
        self.packed = True
        torch.set_num_threads(threads)

    def linear(self, weight: Tensor) -> Linear:
        """A product with `weight` [O, I], of the kind that the self-test chose."""
        return Linear(weight, packed=self.packed)

    def choose_products(self, shapes: Iterable[tuple[int, int, torch.dtype]]) -> None:
        """Self-test: keep packed products if every shape (O, I, dtype) holds, else fall back, and test again.

        Raises:
            MoempiError: neither kind of product keeps a row's bits on this machine.
        """
        wanted = sorted(set(shapes), key=str)
        if _all_hold(wanted, packed=True, threads=(1, 2)):
            torch.set_num_threads(self.threads)
            return
        self.fall_back()
        if not _all_hold(wanted, packed=False, threads=(1,)):
            raise MoempiError(
                "the self-test failed: on this processor and torch build a row's bits depend on its neighbours, "
                "so exact mode cannot keep its promise; try another torch build"
            )

    def fall_back(self) -> None:
        """Padded tiles on one thread: for a rank that failed its self-test, and then for all ranks of the job."""
        self.packed, self.threads = False, 1
        torch.set_num_threads(1)


def _all_hold(shapes: list[tuple[int, int, torch.dtype]], *, packed: bool, threads: tuple[int, ...]) -> bool:
    try:
        return all(row_is_independent(shape, packed=packed, threads=threads) for shape in shapes)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # the operators are not in this build of torch


@lru_cache(maxsize=256)
def row_is_independent(shape: tuple[int, int, torch.dtype], *, packed: bool, threads: tuple[int, ...]) -> bool:
    """Whether one row keeps its bits over row counts, places and thread counts, for a weight [O, I] of a dtype."""
    outputs, inputs, dtype = shape
    random = torch.Generator().manual_seed(outputs * 1000003 + inputs)
    product = Linear(torch.randn(outputs, inputs, generator=random).to(dtype), packed=packed)
    row = torch.randn(1, inputs, generator=random).to(dtype)
    expected = product(row)[0]
    return all(torch.equal(seen, expected) for seen in _sightings(product, row, random, threads))


def _sightings(product: Linear, row: Tensor, random: torch.Generator, threads: tuple[int, ...]) -> Iterator[Tensor]:
    for count in threads:
        torch.set_num_threads(count)
        for rows in SELF_TEST_ROWS:
            others = torch.randn(rows, row.shape[1], generator=random).to(row.dtype)
            for place in {0, rows // 2, rows - 1}:
                x = others.clone()
                x[place] = row[0]
                yield product(x)[place]
