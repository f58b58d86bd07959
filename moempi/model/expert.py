"""One slot's expert: SwiGLU over its range of the hidden dimension, summed leaf by leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from moempi.device.cpu_rows import SmallExpert
from moempi.device.seam import Device
from moempi.model.config import is_small

Part = TypeVar("Part")


def leaf_range(leaf: int, leaves: int, hidden: int) -> tuple[int, int]:
    """Hidden units [lo, hi) of a leaf block; blocks differ by at most one unit."""
    return leaf * hidden // leaves, (leaf + 1) * hidden // leaves


def tree_sum(term: Callable[[int, int], Tensor | None], lo: int, hi: int) -> Tensor:
    """Sum of leaves [lo, hi) in the order of a fixed binary tree.

    Args:
        term: the value of a subtree if it is known as a whole, else None; asked from the top down.
            A single leaf must be known.
    """
    known = term(lo, hi)
    if known is not None:
        return known
    middle = (lo + hi) // 2
    return tree_sum(term, lo, middle) + tree_sum(term, middle, hi)


class Expert:
    """An expert, or the part of it that a slot holds: leaves [lo, hi) of `leaves`.

    Each leaf has products of its own, so that a leaf's bits do not depend on which slot computes it.
    With one leaf the output is rounded once, by the product; with several, the float32 outputs of the
    leaves are added in the tree and a whole expert rounds the sum.

    Args:
        gate_up: [2 (u - l), D] rows of the gate's and the up-projection's hidden range l:u, gate first.
        down: [D, u - l].
        hidden: F, of the whole expert.
    """

    def __init__(self, device: Device, gate_up: Tensor, down: Tensor, lo: int, hi: int, leaves: int, hidden: int):
        self.lo, self.hi, self.leaves = lo, hi, leaves
        self.dtype, self._swiglu = gate_up.dtype, device.swiglu
        begin = leaf_range(lo, leaves, hidden)[0]
        bounds = [leaf_range(leaf, leaves, hidden) for leaf in range(lo, hi)]
        parts = [slice(a - begin, b - begin) for a, b in bounds]
        gate, up = gate_up.chunk(2)
        self._small: list[SmallExpert] = []
        # The largest leaf decides for all, so that it does not matter which of them a slot holds.
        if device.has_small_experts(-(-hidden // leaves), gate.shape[1]):
            self._small = [SmallExpert(gate[part], up[part], down[:, part]) for part in parts]
        else:
            outward = down if leaves == 1 else down.float()
            self._gate_up = [device.linear(torch.cat([gate[part], up[part]])) for part in parts]
            self._down = [device.linear(outward[:, part]) for part in parts]

    @property
    def small(self) -> SmallExpert | None:
        """The whole expert as one kernel, where it is that."""
        return self._small[0] if self._small and self.leaves == 1 else None

    @property
    def nbytes(self) -> int:
        """Of its weights that no cache holds: none where it is small."""
        products = [] if self._small else [*self._gate_up, *self._down]
        return sum(o * i * p.dtype.itemsize for p in products for o, i in [p.shape] if not is_small(o, i))

    @property
    def whole(self) -> bool:
        """Whether the slot holds all leaves of its expert."""
        return self.hi - self.lo == self.leaves

    def __call__(self, x: Tensor) -> Tensor:
        """[R, D] -> [R, D]: in the model's dtype for a whole expert, a float32 partial sum for a part."""
        if self.leaves == 1:
            return self._leaf(0, x, self.dtype)
        partial = tree_sum(lambda lo, hi: self._leaf(lo, x, torch.float32) if hi - lo == 1 else None, self.lo, self.hi)
        return partial.to(self.dtype) if self.whole else partial

    def _leaf(self, leaf: int, x: Tensor, dtype: torch.dtype) -> Tensor:
        number = leaf - self.lo
        if self._small:
            return self._small[number](x, dtype)
        return self._down[number](self._swiglu(self._gate_up[number](x)))
