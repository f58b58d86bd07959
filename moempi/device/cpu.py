"""The CPU as a device: the products that exact mode stands on, and the test that they are what it needs.

A result must not depend on the layout, so the bits of a row may depend neither on how many rows travel
with it, nor on its place among them, nor on the number of threads. oneDNN products with packed weights
have this property for two rows and more; `F.linear` has not. The operators are private to torch: only
`_pack` and `_packed_product` here name them. Where the weight is small a product of these libraries costs what its
call costs, and the kernels of `cpu_rows` take its place; so they do for all that is not a product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device import cpu_rows
from moempi.device.cpu_rows import SmallLinear, is_small
from moempi.errors import MoempiError
from moempi.model.attention import AttentionPlan, Span, plan_attention
from moempi.model.gate import Route, greedy

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

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[R, I] -> [R, O], in the weight's dtype, for any R including 0; `residual` [R, O] is added to it."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.shape[0], dtype=self.dtype)
        x = x.to(self.dtype)
        rows = self._packed_rows(x) if self.packed else self._tiled_rows(x)
        return rows if residual is None else residual + rows

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
    mode = "exact"
    model = ""

    def __init__(self, threads: int = 1):
        self.threads = threads
        self.packed = True
        torch.set_num_threads(threads)

    def describe(self) -> str:
        """For people."""
        return "cpu"

    @property
    def products(self) -> str:
        """Which kind of product; the bits depend on it."""
        return "packed" if self.packed else "tiled"

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor on this device: as it is."""
        return tensor

    def greedy(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Best token and its log-probability.

        Raises:
            MoempiError: a score is not a number.
        """
        return greedy(logits)

    def linear(self, weight: Tensor) -> Linear | SmallLinear:
        """A product with `weight` [O, I]: the kernels' own where it is small, else of the kind that the test chose."""
        if is_small(*weight.shape):
            return SmallLinear(weight)
        return Linear(weight, packed=self.packed)

    def has_small_experts(self, hidden: int, d_model: int) -> bool:
        """Whether an expert of so many hidden units is one kernel (`SmallExpert`)."""
        return is_small(2 * hidden, d_model)

    def plan_attention(self, spans: Sequence[Span], group: int) -> AttentionPlan:
        """Which pages the new positions of several sequences meet."""
        return plan_attention(spans, group)

    def normed(self, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """RMS norm of x [R, D], rounded to `dtype`."""
        return cpu_rows.normed(x, weight, eps).to(dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[R, 2F], gate first -> [R, F]."""
        return cpu_rows.swiglu(gate_up)

    def choose_experts(self, logits: Tensor, top_k: int, normalize: bool) -> Route:
        """The K best experts of logits [T, E] float32."""
        return cpu_rows.choose_experts(logits, top_k, normalize)

    def choose_products(self, shapes: Iterable[tuple[int, int, torch.dtype]]) -> None:
        """Self-test: keep packed products if every shape (O, I, dtype) holds, else fall back, and test again.

        Raises:
            MoempiError: neither kind of product keeps a row's bits on this machine.
        """
        shapes = set(shapes)
        small = sorted({shape for shape in shapes if is_small(*shape[:2])}, key=str)
        large = sorted(shapes - set(small), key=str)
        if _all_hold(large, "packed", threads=(1, 2)):
            torch.set_num_threads(self.threads)
        else:
            self.fall_back()
        if not (_all_hold(small, "small", (1,)) and (self.packed or _all_hold(large, "tiled", threads=(1,)))):
            raise MoempiError(
                "the self-test failed: on this processor and torch build a row's bits depend on its neighbours, "
                "so exact mode cannot keep its promise; try another torch build"
            )

    def fall_back(self) -> None:
        """Padded tiles on one thread: for a rank that failed its self-test, and then for all ranks of the job."""
        self.packed, self.threads = False, 1
        torch.set_num_threads(1)


def _all_hold(shapes: list[tuple[int, int, torch.dtype]], kind: str, threads: tuple[int, ...]) -> bool:
    try:
        return all(row_is_independent(shape, kind, threads) for shape in shapes)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False  # the operators are not in this build of torch


@lru_cache(maxsize=256)
def row_is_independent(shape: tuple[int, int, torch.dtype], kind: str, threads: tuple[int, ...]) -> bool:
    """Whether one row keeps its bits over row counts, places and thread counts, for a weight [O, I] of a dtype.

    Args:
        kind: of product: "small" (the kernels' own), "packed" or "tiled".
    """
    outputs, inputs, dtype = shape
    random = torch.Generator().manual_seed(outputs * 1000003 + inputs)
    weight = torch.randn(outputs, inputs, generator=random).to(dtype)
    product = SmallLinear(weight) if kind == "small" else Linear(weight, packed=kind == "packed")
    row = torch.randn(1, inputs, generator=random).to(dtype)
    expected = product(row)[0]
    return all(torch.equal(seen, expected) for seen in _sightings(product, row, random, threads))


def _sightings(
    product: Linear | SmallLinear, row: Tensor, random: torch.Generator, threads: tuple[int, ...]
) -> Iterator[Tensor]:
    for count in threads:
        torch.set_num_threads(count)
        for rows in SELF_TEST_ROWS:
            others = torch.randn(rows, row.shape[1], generator=random).to(row.dtype)
            for place in {0, rows // 2, rows - 1}:
                x = others.clone()
                x[place] = row[0]
                yield product(x)[place]
