"""The experts of one layer on a GPU, all slots of the rank in one stack, computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device.cuda_products import Section, grouped_product, product
from moempi.device.cuda_rows import swiglu
from moempi.model.expert import Expert

# Fewer rows per slot than this, and one launch for all slots is faster than cuBLAS slot by slot.
GROUP_BELOW = 128


@dataclass(frozen=True)
class Part:
    """Rows for one slot: [R, D] in, [R, D] out, both in the memory of messages."""

    slot: int
    rows: Tensor
    answer: Tensor


class Stack:
    """Whole experts of one layer.

    Args:
        gate_up: [S, 2F, D].
        down: [S, D, F].
        exact: the bits of a row depend on that row alone.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, *, exact: bool):
        self.gate_up, self.down, self.exact = gate_up, down, exact

    def __call__(self, parts: Sequence[Part], memory: Tensor) -> None:
        """Compute all parts. Rows and answers lie in `memory`, which is flat and in the model's dtype."""
        rows = sum(len(part.rows) for part in parts)
        if self.exact and len(parts) == 1:
            self._alone(parts[0])
        elif self.exact or (len(parts) > 1 and rows < GROUP_BELOW * len(parts)):
            self._together(parts, memory, rows)
        else:
            self._one_by_one(parts)

    def _alone(self, part: Part) -> None:
        """The bits of `_together`, without its tables: the same kernel and tile."""
        gated = product(part.rows, self.gate_up[part.slot])
        product(swiglu(gated), self.down[part.slot], out=part.answer)

    def _together(self, parts: Sequence[Part], memory: Tensor, rows: int) -> None:
        outputs = self.gate_up.shape[1]
        gated = torch.empty(rows, outputs, dtype=self.gate_up.dtype, device=self.gate_up.device)
        inward, outward, begin = [], [], 0
        for part in parts:
            n = len(part.rows)
            inward.append(Section(part.slot, n, int(part.rows.storage_offset()), begin * outputs))
            outward.append(Section(part.slot, n, begin * outputs // 2, int(part.answer.storage_offset())))
            begin += n
        grouped_product(memory, self.gate_up, gated.view(-1), inward)
        grouped_product(swiglu(gated).view(-1), self.down, memory, outward)

    def _one_by_one(self, parts: Sequence[Part]) -> None:
        for part in parts:
            hidden = swiglu(F.linear(part.rows, self.gate_up[part.slot]))
            torch.mm(hidden, self.down[part.slot].T, out=part.answer)


class Pieces:
    """Experts of one layer that are summed leaf by leaf, or parts of experts, computed one after the other.

    Args:
        slots: by their number on this rank.
    """

    def __init__(self, slots: Mapping[int, Expert]):
        self._slots = slots

    def __call__(self, parts: Sequence[Part], memory: Tensor) -> None:
        """Compute all parts into their answers."""
        for part in parts:
            part.answer.copy_(self._slots[part.slot](part.rows))


Layer = Stack | Pieces
