"""The CPU as a device: the products that exact mode stands on, and the test that they are what it needs.

A result must not depend on the layout, so the bits of a row may depend neither on how many rows travel with it, nor on
its place among them, nor on the number of threads. The kernels of `cpu_rows` have this property by how they are
written. They take all that is not a product, products with small weights, and those with large ones where the processor
has the instructions that they are fast with, and none with which a library is faster. oneDNN products with packed
weights have the property for four rows and more, on some processors as long as the rows are few (with the tile
instructions of AMX a long batch is summed in another order, and so are two rows of less than a tile); `F.linear` has
not. The operators are private to torch: only `_pack` and `_packed_product` here name them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device import cpu_rows
from moempi.device.cpu_rows import SmallLinear, WideLinear
from moempi.device.kernels import ARITHMETIC
from moempi.device.kernels.compiled import has_wide_product
from moempi.device.seam import ProductShape
from moempi.device.telling import telling_product
from moempi.errors import MoempiError
from moempi.model.config import is_small, is_small_expert
from moempi.model.gate import Route

TILE_ROWS = 16  # rows of a tile, and the multiple that features are padded to, where products are not packed
PACK_ROWS = 16  # the row count that oneDNN chooses its blocking for; part of the bits
LEAST_ROWS = 4  # of a packed product
PIECE_ROWS = 32  # most rows of a packed product where longer batches change its bits
# Kinds of large products, the fastest first: of kernels, packed, packed in pieces of PIECE_ROWS, padded tiles.
PRODUCTS = ("kernels", "packed", "pieces", "tiled")
SELF_TEST_ROWS = (1, 2, 3, 5, 8, 17, 33, 48, 64, 67, 130, 257, 512, 640)


class Linear:
    """`y = x @ weight.T`, the bits of every row depending on that row alone.

    Args:
        weight: [O, I], float32 or bfloat16; packed, so that the caller can drop it.
        kind: of a library; packed and pieces: oneDNN with packed weights; tiled: padded `F.linear` on tiles of 16 rows.
    """

    def __init__(self, weight: Tensor, kind: str = "packed"):
        self.shape = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self.kind = kind
        self._weight = _pad_features(weight) if kind == "tiled" else _pack(weight)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[R, I] -> [R, O], in the weight's dtype, for any R including 0; `residual` [R, O] is added to it."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0], dtype=self.dtype)
        x = x.to(self.dtype)
        rows = self._rows(x)
        return rows if residual is None else residual + rows

    def _rows(self, x: Tensor) -> Tensor:
        if self.kind == "tiled":
            return self._tiled_rows(x)
        if self.kind == "packed" or len(x) <= PIECE_ROWS:
            return self._packed_rows(x)
        return torch.cat([self._packed_rows(piece) for piece in x.split(PIECE_ROWS)])

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
        return torch.cat(tiles)[:rows, : self.shape[0]].contiguous()  # kernels read rows without gaps


def padded_rows(rows: int) -> int:
    """Rows that a packed product is called with: one or two take other kernels, so there are at least four.

    oneDNN compiles a kernel for every row count that it meets, which takes 0.7 ms; a batch that shrinks and grows
    would meet hundreds. Padding to a few counts costs less, and the bits of a row do not change.
    """
    if rows <= TILE_ROWS:
        return max(LEAST_ROWS, 1 << (rows - 1).bit_length())
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


Product = Linear | SmallLinear | WideLinear


def product_with(weight: Tensor, kind: str) -> Product:
    """A product with `weight` [O, I], "small" or of a kind of PRODUCTS."""
    if kind == "small":
        return SmallLinear(weight)
    return WideLinear(weight) if kind == "kernels" else Linear(weight, kind)


class Cpu:
    """Products on the CPU, and whether they passed their self-test.

    Args:
        threads: torch threads of this rank.
    """

    name = "cpu"
    mode = "exact"
    model = ""
    arithmetic = ARITHMETIC

    def __init__(self, threads: int = 1):
        self.threads = threads
        has_kernels = has_wide_product(False) and has_wide_product(True)
        self.products = PRODUCTS[0 if has_kernels else 1]  # the kind of all large ones; the bits depend on it
        torch.set_num_threads(threads)

    def describe(self) -> str:
        """For people."""
        return "cpu"

    def memory_use(self) -> None:
        """Not known: the memory of a process is the interpreter's and MPI's too."""

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on this device: as it is."""
        return tensor

    def linear(self, weight: Tensor, out: torch.dtype | None = None) -> Product:
        """A product with `weight` [O, I]: of the kind that the test chose where it is large. It computes in `out`."""
        weight = weight.to(out or weight.dtype)
        return product_with(weight, "small" if is_small(*weight.shape) else self.products)

    def has_small_experts(self, hidden: int, d_model: int) -> bool:
        """Whether an expert of so many hidden units is one kernel (`SmallExpert`)."""
        return is_small_expert(hidden, d_model)

    def normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm of x [R, D], in its dtype."""
        return cpu_rows.normed(x, weight, eps).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[R, 2F], gate first -> [R, F]."""
        return cpu_rows.swiglu(gate_up)

    def choose_experts(self, logits: Tensor, top_k: int, normalize: bool) -> Route:
        """The K best experts of logits [T, E] float32."""
        return cpu_rows.choose_experts(logits, top_k, normalize)

    def choose_products(self, shapes: Iterable[ProductShape], slowest: str = PRODUCTS[0]) -> None:
        """Self-test: take the first kind of PRODUCTS whose bits hold for every shape.

        Args:
            slowest: a kind that others have taken: none before it is tried.

        Raises:
            MoempiError: no kind of product keeps a row's bits on this machine.
        """
        computed = {(shape.outputs, shape.inputs, shape.out) for shape in shapes}
        small = sorted({shape for shape in computed if is_small(*shape[:2])}, key=str)
        large = sorted(computed - set(small), key=str)
        threads = {"tiled": (1,)}
        kinds = PRODUCTS[PRODUCTS.index(slowest) :]
        held = next((kind for kind in kinds if _all_hold(large, kind, threads.get(kind, (1, 2)))), None)
        if held is None or not _all_hold(small, "small", (1,)):
            raise MoempiError(
                "the self-test failed: on this processor and torch build a row's bits depend on its neighbours, "
                "so exact mode cannot keep its promise; try another torch build"
            )
        self.take_products(held)

    def take_products(self, kind: str) -> None:
        """Compute with products of a kind of PRODUCTS: all ranks of a job take the same. Tiles hold on one thread."""
        self.products = kind
        self.threads = 1 if kind == "tiled" else self.threads
        torch.set_num_threads(self.threads)


def _all_hold(shapes: list[tuple[int, int, torch.dtype]], kind: str, threads: tuple[int, ...]) -> bool:
    if kind == "kernels" and not all(has_wide_product(dtype == torch.bfloat16) for *_, dtype in shapes):
        return False
    try:
        return all(row_is_independent(shape, kind, threads) for shape in shapes)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # the operators are not in this build of torch


@lru_cache(maxsize=256)
def row_is_independent(shape: tuple[int, int, torch.dtype], kind: str, threads: tuple[int, ...]) -> bool:
    """Whether rows keep their bits over row counts, places and thread counts, for a weight [O, I] of a dtype.

    Args:
        kind: "small", or one of PRODUCTS.
    """
    rows, weight = telling_product(shape, SELF_TEST_ROWS[-1])
    product = product_with(weight, kind)
    torch.set_num_threads(1)
    expected = torch.cat([product(tile) for tile in rows.split(TILE_ROWS)])
    for count in threads:
        torch.set_num_threads(count)
        for n in SELF_TEST_ROWS:
            lo = min(n, len(rows) - n)  # another place in the batch than in its tile
            if not torch.equal(product(rows[lo : lo + n]), expected[lo : lo + n]):
                return False
    return True
