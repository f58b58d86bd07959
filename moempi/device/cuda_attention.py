"""Causal attention on the GPU over a paged cache: one kernel for prefill, chunks and decode.

A program has a tile of query rows of one sequence, 16 or 64, and goes through the pages of its keys in order, by online
softmax (Milakov and Gimelshein, 2018). Pages are blocks of fixed length counted from position 0, so a row's bits
depend neither on the chunk that it came in nor on its company: a page that is masked for a row leaves it as it was.
Nor do they on the tile, as `tiles_agree` tests: whatever is summed is a product, whose order is the same in all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_transfer import all_to_device, words_of
from moempi.device.cuda_triton import WIDE, Compiled, compiled
from moempi.device.telling import telling_cache
from moempi.device.tile_plan import TILE, WIDE_TILE, TilePlan, plan_tiles
from moempi.model.attention import Span
from moempi.model.config import PAGE, padded_head


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
    q = tl.load(queries + at, mask=inside, other=0.0)
    highest = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE, 16), dtype=tl.float32)  # the same in all columns
    ones = tl.full((PAGE, 16), 1.0, dtype=values.dtype.element_ty)
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
        weights = weights.to(v.dtype)
        total = total * shrink[:, None] + tl.dot(weights, ones, input_precision="ieee")
        mixed = mixed * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        highest = peak
    tl.store(out + at, (mixed / tl.max(total, 1)[:, None]).to(out.dtype.element_ty), mask=inside)


def attend(queries: Tensor, keys: Tensor, values: Tensor, plan: TilePlan) -> Tensor:
    """Attention of a batch; its keys and values must be in the cache already.

    Args:
        queries: [T, heads, head_dim] in the cache's dtype, normalised, rotated and scaled.
        keys: [pages, kv_heads, width, PAGE], one layer of the cache.
        values: [pages, kv_heads, PAGE, width].
        plan: on the GPU.

    Returns:
        [T, heads * head_dim] in the cache's dtype.
    """
    assert queries.dtype == keys.dtype == values.dtype, "the kernel reads all of them as the cache's"
    n_tokens, n_heads, head_dim = queries.shape
    n_kv_heads, width = keys.shape[1], keys.shape[2]
    out = torch.empty(n_tokens, n_heads * head_dim, dtype=keys.dtype, device=keys.device)
    if n_tokens:
        tensors = queries.contiguous(), keys, values, out, plan.tiles, plan.row_positions, plan.pages
        addresses = [t.data_ptr() for t in tensors]
        aligned = tuple(address % WIDE == 0 for address in addresses)
        heads = n_heads, n_kv_heads, head_dim, width, plan.group
        kernel = _compiled(keys.dtype, aligned, *heads, plan.row_positions.shape[1])
        kernel((len(plan.tiles), n_kv_heads, 1), *addresses, plan.pages.shape[1])
    return out


@lru_cache(maxsize=16)
def tiles_agree(n_heads: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Self-test of exact mode: whether a row has the same bits in tiles of `TILE` and of `WIDE_TILE` rows.

    Args:
        dtype: of the cache. The host waits for the GPU, once for each kind of heads.
    """
    n, group, width = 2 * PAGE + 7, n_heads // n_kv_heads, padded_head(head_dim)
    keys, values = telling_cache(3, n_kv_heads, width, PAGE, dtype, device)
    random = torch.Generator(device).manual_seed(n_heads * 1000003 + head_dim)
    queries = (torch.randn(n, n_heads, head_dim, generator=random, device=device) * head_dim**-0.5).to(dtype)
    found = []
    for size in (TILE, WIDE_TILE):
        plan = plan_tiles([Span(0, n, (2, 0, 1))], group, size)
        tensors = plan.tensors()
        memory = torch.empty(words_of(tensors), dtype=torch.int64, device=device)
        there = replace(plan, **all_to_device(tensors, memory))  # type: ignore[arg-type]
        found.append(attend(queries, keys, values, there))
    return torch.equal(*found)


@cache
def _compiled(
    dtype: torch.dtype,
    aligned: tuple[bool, ...],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    width: int,
    group: int,
    tile: int,
) -> Compiled:
    """The kernel for heads of a kind, with tiles of so many rows."""
    constants = {
        "N_HEADS": n_heads,
        "N_KV_HEADS": n_kv_heads,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "GROUP": group,
        "TILE": tile,
        "PAGE": PAGE,
        "DIMS": max(16, triton.next_power_of_2(head_dim)),
    }
    types = dtype, dtype, dtype, dtype, torch.int32, torch.int32, torch.int64
    pointers = list(zip(types, aligned, strict=True))
    return compiled(_attend, pointers, (2,), constants, num_warps=4, num_stages=2)
