"""Heads turned and put into the cache, plainly: what the kernels of both devices are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from moempi.model.attention import AttentionPlan
from moempi.model.cache import KVCache
from moempi.model.ops import Rotary


def turn(x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
    """x [T, heads, head_dim] float32, each row turned as far as its position [T]."""
    cos, sin = rotary.cos[positions].unsqueeze(1), rotary.sin[positions].unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([high, low], dim=-1) * sin


def store(cache: KVCache, layer: int, plan: AttentionPlan, keys: Tensor, values: Tensor) -> None:
    """Keys and values [T, kv_heads, head_dim] of a plan's new positions into their pages."""
    width, where = keys.shape[-1], (plan.write_pages, plan.write_offsets)
    cache.keys[layer][where[0], :, :width, where[1]] = keys.to(cache.keys.dtype)
    cache.values[layer][where[0], :, where[1], :width] = values.to(cache.values.dtype)
