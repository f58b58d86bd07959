"""The experts of one layer on a GPU, all slots of the rank in one stack, computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import Section, grouped_product, product_at
from moempi.device.cuda_rows import swiglu
from moempi.model.expert import Expert

# Fewer rows per slot than this, and one launch for all slots is faster than cuBLAS slot by slot.
GROUP_BELOW = 128
FEW = 2  # parts that exact mode takes one after the other: launching both takes less of the host than a table


@dataclass(frozen=True)
class Part:
    """Rows for one slot: [R, D] in, [R, D] out, both in the memory of messages."""

    slot: int
    rows: Rows
    answer: Rows


class Stack:
    """Whole experts of one layer.

    Args:
        gate_up: [S, 2F, D].
        down: [S, D, F].
        exact: the bits of a row depend on that row alone.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, *, exact: bool):
        self.gate_up, self.down, self.exact = gate_up, down, exact
        self._gate_up, self._down = gate_up.unbind(), down.unbind()  # a view made once
        self._down_turned = [weight.T for weight in self._down]

    def __call__(self, parts: Sequence[Part], memory: Tensor) -> None:
        """Compute all parts. Rows and answers lie in `memory`, which is flat and in the model's dtype."""
        rows = sum(len(part.rows) for part in parts)
        few = len(parts) <= FEW if self.exact else rows >= GROUP_BELOW * len(parts) or len(parts) == 1
        if not few:
            self._together(parts, memory, rows)
            return
        for part in parts:
            if self.exact:
                self._exactly(part)
            else:
                hidden = swiglu(F.linear(part.rows.tensor(), self._gate_up[part.slot]))
                torch.mm(hidden, self._down_turned[part.slot], out=part.answer.tensor())

    def _exactly(self, part: Part) -> None:
        """The bits of `_together`, without its tables: the same kernel."""
        weight, n = self._gate_up[part.slot], len(part.rows)
        gated = torch.empty(n, weight.shape[0], dtype=weight.dtype, device=weight.device)
        product_at(part.rows.address, n, weight, gated.data_ptr())
        hidden = swiglu(gated)
        product_at(hidden.data_ptr(), n, self._down[part.slot], part.answer.address)

    def _together(self, parts: Sequence[Part], memory: Tensor, rows: int) -> None:
        outputs = self.gate_up.shape[1]
        gated = torch.empty(rows, outputs, dtype=self.gate_up.dtype, device=self.gate_up.device)
        inward, outward, begin = [], [], 0
        for part in parts:
            n = len(part.rows)
            inward.append(Section(part.slot, n, part.rows.begin, begin * outputs))
            outward.append(Section(part.slot, n, begin * outputs // 2, part.answer.begin))
            begin += n
        grouped_product(memory, self.gate_up, gated.view(-1), inward)
        grouped_product(swiglu(gated).view(-1), self.down, memory, outward)


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
            part.answer.tensor().copy_(self._slots[part.slot](part.rows.tensor()))


Layer = Stack | Pieces
