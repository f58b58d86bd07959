"""Operations on rows whose bits depend on the row alone: normalisation, activation; and the tables of rotary embedding.

All compute in float32. `F.silu` and `torch.sigmoid` are not used: their vector body and scalar tail differ
in the last bit, so a row's value would depend on how many rows travel with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] of any float dtype, weight [D] float32 -> [..., D] float32 (Zhang and Sennrich, 2019)."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [R, 2F], gate first -> silu(gate) * up [R, F] in the same dtype (Shazeer, 2020)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)


class Rotary:
    """Rotary position embedding (Su et al., 2021), the two halves of a head rotated against each other.

    Args:
        head_dim: even.
        positions: how many positions the tables hold.
        theta: the base of the frequencies.
        place: puts the tables where they are used.
    """

    def __init__(
        self, head_dim: int, positions: int, theta: float, place: Callable[[Tensor], Tensor] = lambda table: table
    ):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        angles = torch.outer(torch.arange(positions).float(), 1.0 / theta**exponents)
        # [positions, head_dim]; a head is turned as x * cos + (x, its halves swapped) * sin
        self.cos = place(torch.cat([angles.cos(), angles.cos()], dim=-1))
        self.sin = place(torch.cat([-angles.sin(), angles.sin()], dim=-1))
