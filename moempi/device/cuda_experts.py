"""The experts of one layer on a GPU, all slots of the rank in one stack, computed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import Section, grouped_product, product_at
from moempi.device.cuda_rows import swiglu, swiglu_at
from moempi.model.expert import Expert

# Fewer rows per slot than this, and one launch for all slots is faster than cuBLAS slot by slot.
GROUP_BELOW = 128
FEW = 3  # parts that are launched one after the other, which takes less of the host than a table of them


class Part(NamedTuple):
    """Rows for one slot: [R, D] in, [R, D] out, both in the memory of messages."""

    slot: int
    rows: Rows
    answer: Rows


class Scratch:
    """Memory for what lies between two products. Calls follow each other on one stream, so all layers share it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, n: int, like: Tensor) -> Tensor:
        """Flat memory of at least n elements, of the dtype and on the device of another tensor."""
        if self._memory is None or self._memory.numel() < n:
            self._memory = torch.empty(n, dtype=like.dtype, device=like.device)
        return self._memory


class Stack:
    """Whole experts of one layer.

    Args:
        gate_up: [S, 2F, D].
        down: [S, D, F].
        exact: the bits of a row depend on that row alone.
        scratch: shared with the other layers of the rank.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, *, exact: bool, scratch: Scratch):
        self.gate_up, self.down, self.exact, self._scratch = gate_up, down, exact, scratch
        self._gate_up, self._down = gate_up.unbind(), down.unbind()  # views made once
        self._down_turned = [weight.T for weight in self._down]

    def __call__(self, parts: Sequence[Part], memory: Tensor) -> None:
        """Compute all parts. Rows and answers lie in `memory`, which is flat and in the model's dtype."""
        rows = sum(len(part.rows) for part in parts)
        # cuBLAS pays where there are many rows; with few, all wait for the weights, and its calls take longer.
        fixed = self.exact or rows < GROUP_BELOW * len(parts)
        if fixed and len(parts) > FEW:
            self._together(parts, memory, rows)
            return
        for part in parts:
            if fixed:
                self._fixed(part)
            else:
                hidden = swiglu(F.linear(part.rows.tensor(), self._gate_up[part.slot]))
                torch.mm(hidden, self._down_turned[part.slot], out=part.answer.tensor())

    def _fixed(self, part: Part) -> None:
        """The bits of `_together`, without its tables: the same kernel."""
        gate_up, down, n = self._gate_up[part.slot], self._down[part.slot], len(part.rows)
        width = gate_up.shape[0]
        scratch = self._scratch.take(n * (width + width // 2), gate_up)
        gated = scratch.data_ptr()
        hidden = gated + n * width * gate_up.itemsize
        product_at(part.rows.address, n, gate_up, gated)
        swiglu_at(gated, n, width // 2, gate_up.dtype, hidden)
        product_at(hidden, n, down, part.answer.address)

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
