"""Numbers for the self-tests of exact mode: such that another order of a sum shows in its bits.

Rounding to bfloat16 hides most of what another order changes: of numbers as they come, one result in some thousands
shows it. So every other one cancels itself out, and what is left of it is what summation rounded away.
"""

from __future__ import annotations

import torch
from torch import Tensor


def telling_product(
    shape: tuple[int, int, torch.dtype], rows: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Rows [R, I] and a weight [O, I] for a product of shape (O, I, dtype); the odd rows cancel themselves out.

    Args:
        rows: R.
        device: None for the CPU.
    """
    outputs, inputs, dtype = shape
    random = torch.Generator(device or "cpu").manual_seed(outputs * 1000003 + inputs)
    weight = torch.randn(outputs, inputs, generator=random, device=device)
    x, half = torch.randn(rows, inputs, generator=random, device=device), inputs // 2
    weight[:, half : 2 * half] = weight[:, :half]
    x[1::2, half:] = 0
    x[1::2, half : 2 * half] = -x[1::2, :half]
    return x.to(dtype), weight.to(dtype)


def telling_cache(
    pages: int, kv_heads: int, width: int, page: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys [pages, kv_heads, width, page] and values [pages, kv_heads, page, width] of a cache.

    In a block of 32 positions the second half has the keys of the first, and in every other dimension the negative of
    its values: whoever sees whole blocks weighs both halves alike, and they cancel.

    Args:
        page: positions of one, a multiple of 32.
    """
    random = torch.Generator(device).manual_seed(page * 1000003 + width)
    keys = torch.randn(pages, kv_heads, width, page // 32, 2, 16, generator=random, device=device)
    values = torch.randn(pages, kv_heads, page // 32, 2, 16, width, generator=random, device=device)
    keys[..., 1, :] = keys[..., 0, :]
    values[..., 1, :, ::2] = -values[..., 0, :, ::2]
    return keys.flatten(3).to(dtype), values.flatten(2, 4).to(dtype)
