"""Causal attention on the GPU over a paged cache: one kernel for prefill, chunks and decode.

A program has a tile of 16 query rows of one sequence and goes through the pages of its keys in order, by online
softmax (Milakov and Gimelshein, 2018). Pages are blocks of fixed length counted from position 0, so a row's bits
depend neither on the chunk that it came in nor on its company: a page that is masked for a row leaves it as it was.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_triton import WIDE, Compiled, compiled
from moempi.device.tile_plan import TILE, TilePlan
from moempi.model.config import PAGE


@triton.jit(do_not_specialize=["n_columns"])
def _attend(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    out,
    tiles,
    row_positions,
    pages,
    n_columns,
    scale,
    N_HEADS: tl.constexpr,  # noqa: N803
    N_KV_HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    PAGE: tl.constexpr,  # noqa: N803
    DIMS: tl.constexpr,  # noqa: N803
):
    tile = tl.program_id(0)
    kv = tl.program_id(1)
    first = tl.load(tiles + 4 * tile)
    n_rows = tl.load(tiles + 4 * tile + 1)
    n_pages = tl.load(tiles + 4 * tile + 2)
    book = pages + tl.load(tiles + 4 * tile + 3).to(tl.int64) * n_columns
    row = first + tl.arange(0, TILE)
    there = tl.arange(0, TILE) < n_rows
    position = tl.load(row_positions + tile * TILE + tl.arange(0, TILE))
    dim = tl.arange(0, DIMS)
    key = tl.arange(0, PAGE)
    # [TILE, DIMS], the heads of a group beside each other
    at = ((row // GROUP).to(tl.int64) * N_HEADS + kv * GROUP + row % GROUP)[:, None] * HEAD_DIM + dim[None, :]
    inside = there[:, None] & (dim[None, :] < HEAD_DIM)
    q = (tl.load(queries + at, mask=inside, other=0.0) * scale).to(keys.dtype.element_ty)
    highest = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    mixed = tl.zeros((TILE, DIMS), dtype=tl.float32)
    for j in range(n_pages):
        page = (tl.load(book + j) * N_KV_HEADS + kv) * WIDTH * PAGE
        k = tl.load(keys + page + dim[:, None] * PAGE + key[None, :], mask=dim[:, None] < WIDTH, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        scores = tl.where(j * PAGE + key[None, :] <= position[:, None], scores, float("-inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - peak)
        weights = tl.exp(scores - peak[:, None])
        v = tl.load(values + page + key[:, None] * WIDTH + dim[None, :], mask=dim[None, :] < WIDTH, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = peak
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: TilePlan) -> Tensor:
    """Attention of a batch; its keys and values must be in the cache already.

    Args:
        queries: [T, heads, head_dim] float32, normalised and rotated, not yet scaled.
        keys: [pages, kv_heads, width, PAGE], one layer of the cache.
        values: [pages, kv_heads, PAGE, width].
        plan: on the GPU.

    Returns:
        [T, heads * head_dim] in the cache's dtype.
    """
    n_tokens, n_heads, head_dim = queries.shape
    n_kv_heads, width = keys.shape[1], keys.shape[2]
    out = torch.empty(n_tokens, n_heads * head_dim, dtype=keys.dtype, device=keys.device)
    if n_tokens:
        tensors = queries.contiguous(), keys, values, out, plan.tiles, plan.row_positions, plan.pages
        addresses = [t.data_ptr() for t in tensors]
        aligned = tuple(address % WIDE == 0 for address in addresses)
        kernel = _compiled(keys.dtype, aligned, n_heads, n_kv_heads, head_dim, width, plan.group)
        kernel((len(plan.tiles), n_kv_heads, 1), *addresses, plan.pages.shape[1], head_dim**-0.5)
    return out


@cache
def _compiled(
    dtype: torch.dtype, aligned: tuple[bool, ...], n_heads: int, n_kv_heads: int, head_dim: int, width: int, group: int
) -> Compiled:
    """The kernel for heads of a kind."""
    constants = {
        "N_HEADS": n_heads,
        "N_KV_HEADS": n_kv_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "GROUP": group,
        "TILE": TILE,
        "PAGE": PAGE,
        "DIMS": max(16, triton.next_power_of_2(head_dim)),
    }
    types = torch.float32, dtype, dtype, dtype, torch.int32, torch.int32, torch.int64
    pointers = list(zip(types, aligned, strict=True))
    return compiled(_attend, pointers, (2, head_dim**-0.5), constants, num_warps=4, num_stages=2)
