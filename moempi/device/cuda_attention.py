"""Causal attention on the GPU over a paged cache: one kernel for prefill, chunks and decode.

A program has a tile of 16 query rows of one sequence and goes through the pages of its keys in order, by online
softmax (Milakov and Gimelshein, 2018). Pages are blocks of fixed length counted from position 0, so a row's bits
depend neither on the chunk that it came in nor on its company: a page that is masked for a row leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_transfer import all_to_device, words_of
from moempi.device.cuda_triton import WIDE, Compiled, compiled
from moempi.model.attention import AttentionPlan, Span, plan_attention
from moempi.model.config import PAGE
from moempi.planning.gpu_memory import ROUND, STEADY

TILE = 16  # query rows; the least that a product on the GPU takes
COLUMNS = 8  # to a multiple of which the pages of the longest sequence are padded in a steady step


@dataclass(frozen=True)
class TilePlan(AttentionPlan):
    """Which rows meet which pages, for the T new positions of a batch; the same for every layer. On the host.

    A *query row* is a (position, head of the group) pair of one sequence, as in `moempi.model.attention`.
    """

    tiles: Tensor  # [A, 4] int32: first query row, rows, pages, line of `pages`
    row_positions: Tensor  # [A, TILE] int32; -1 for padding
    group: int  # query heads per key-value head
    steady: bool = False  # one new position of every sequence, and padding behind them: shapes that come again

    def tensors(self) -> dict[str, Tensor]:
        """What kernels read, by name."""
        return {name: getattr(self, name) for name in _READ}

    def on(self, device: torch.device) -> TilePlan:
        """The same on the GPU."""
        tensors = self.tensors()
        memory = torch.empty(words_of(tensors), dtype=torch.int64, device=device)
        return replace(self, **all_to_device(tensors, memory))  # type: ignore[arg-type]


_READ = "positions", "write_pages", "write_offsets", "pages", "tiles", "row_positions"


def plan_step(spans: Sequence[Span], group: int, spare: int) -> TilePlan:
    """The plan of a step. With one new position of each of a few sequences it is padded to one of few shapes.

    Args:
        spans: as of `plan_tiles`.
        spare: page that padding writes to and reads.
    """
    n = len(spans)
    if n > STEADY or any(span.end - span.begin != 1 for span in spans):
        return plan_tiles(spans, group)
    plan = plan_tiles([*spans, *[Span(0, 1, (spare,))] * (-n % ROUND)], group)
    columns = plan.pages.shape[1]
    return replace(plan, pages=F.pad(plan.pages, (0, -columns % COLUMNS)), steady=True)


def plan_tiles(spans: Sequence[Span], group: int) -> TilePlan:
    """Tiles and pages for the new positions of several sequences.

    Args:
        spans: one per sequence, in the order of their rows in the batch.
        group: query heads per key-value head.
    """
    plan = plan_attention(spans, group)
    begins, ends = np.array([(span.begin, span.end) for span in spans]).T
    n_rows = (ends - begins) * group
    n_tiles = -(-n_rows // TILE)
    owner = np.repeat(np.arange(len(spans)), n_tiles)
    tile = np.arange(len(owner)) - (n_tiles.cumsum() - n_tiles)[owner]  # of its sequence
    rows = tile[:, None] * TILE + np.arange(TILE)
    row_positions = np.where(rows < n_rows[owner, None], begins[owner, None] + rows // group, -1)
    n_pages = row_positions.max(1) // PAGE + 1
    first = (n_rows.cumsum() - n_rows)[owner] + tile * TILE
    tiles = np.array([first, np.minimum(TILE, n_rows[owner] - tile * TILE), n_pages, owner], dtype=np.int32).T
    return TilePlan(
        **vars(plan),
        tiles=torch.from_numpy(np.ascontiguousarray(tiles)),
        row_positions=torch.from_numpy(row_positions.astype(np.int32)),
        group=group,
    )


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
