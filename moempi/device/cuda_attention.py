"""Causal attention on the GPU over a paged cache: one kernel for prefill, chunks and decode.

A program has a tile of 16 query rows of one sequence and goes through the pages of its keys in order, by online
softmax (Milakov and Gimelshein, 2018). Pages are blocks of fixed length counted from position 0, so a row's bits
depend neither on the chunk that it came in nor on its company: a page that is masked for a row leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moempi.device.cuda_transfer import to_device
from moempi.model.attention import Span
from moempi.model.config import PAGE

TILE = 16  # query rows; the least that a product on the GPU takes


@dataclass(frozen=True)
class TilePlan:
    """Which rows meet which pages, for the T new positions of a batch; the same for every layer. On the host.

    A *query row* is a (position, head of the group) pair of one sequence, as in `moempi.model.attention`.
    """

    positions: Tensor  # [T] int64, position in its sequence
    write_pages: Tensor  # [T] int64, page of each new position
    write_offsets: Tensor  # [T] int64, place in the page
    tiles: Tensor  # [A, 4] int32: first query row, rows, pages, 0
    row_positions: Tensor  # [A, TILE] int32; -1 for padding
    pages: Tensor  # [A, most] int32, pages of a tile's sequence; padding 0
    group: int  # query heads per key-value head

    def on(self, device: torch.device) -> TilePlan:
        """The same on the GPU."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: to_device(value, device) for name, value in tensors.items()})  # type: ignore[arg-type]


def plan_tiles(spans: Sequence[Span], group: int) -> TilePlan:
    """Tiles and pages for the new positions of several sequences.

    Args:
        spans: one per sequence, in the order of their rows in the batch.
        group: query heads per key-value head.
    """
    positions = np.concatenate([np.arange(s.begin, s.end) for s in spans])
    owners = np.repeat(np.arange(len(spans)), [s.end - s.begin for s in spans])
    first, tiles, tile_owners = 0, [], []
    for number, span in enumerate(spans):
        n = (span.end - span.begin) * group
        begins = np.arange(0, n, TILE)
        tiles.append(np.stack([first + begins, np.minimum(TILE, n - begins)], axis=1))
        tile_owners += [number] * len(begins)
        first += n
    bounds = np.concatenate(tiles)  # [A, 2]
    rows = bounds[:, :1] + np.arange(TILE)
    there = np.arange(TILE) < bounds[:, 1:]
    row_positions = np.where(there, positions[np.minimum(rows, first - 1) // group], -1)
    n_pages = row_positions.max(1) // PAGE + 1
    book = np.zeros((len(spans), int(n_pages.max())), dtype=np.int64)
    for number, span in enumerate(spans):
        known = span.pages[: book.shape[1]]
        book[number, : len(known)] = known
    columns = np.stack([bounds[:, 0], bounds[:, 1], n_pages, np.zeros_like(n_pages)], axis=1)
    pages_of_spans = [np.asarray(s.pages, dtype=np.int64)[np.arange(s.begin, s.end) // PAGE] for s in spans]
    return TilePlan(
        positions=torch.from_numpy(positions),
        write_pages=torch.from_numpy(np.concatenate(pages_of_spans)),
        write_offsets=torch.from_numpy(positions % PAGE),
        tiles=torch.from_numpy(columns.astype(np.int32)),
        row_positions=torch.from_numpy(row_positions.astype(np.int32)),
        pages=torch.from_numpy(book[np.array(tile_owners)].astype(np.int32)),
        group=group,
    ) if len(owners) else _nothing(group)


def _nothing(group: int) -> TilePlan:
    none = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0, TILE, dtype=torch.int32)
    return TilePlan(none, none, none, empty[:, :4], empty, empty[:, :1], group)


@triton.jit
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
    n_heads,
    n_kv_heads,
    head_dim,
    width,
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
    row = first + tl.arange(0, TILE)
    there = tl.arange(0, TILE) < n_rows
    position = tl.load(row_positions + tile * TILE + tl.arange(0, TILE))
    dim = tl.arange(0, DIMS)
    key = tl.arange(0, PAGE)
    # [TILE, DIMS], the heads of a group beside each other
    at = ((row // GROUP).to(tl.int64) * n_heads + kv * GROUP + row % GROUP)[:, None] * head_dim + dim[None, :]
    inside = there[:, None] & (dim[None, :] < head_dim)
    q = (tl.load(queries + at, mask=inside, other=0.0) * scale).to(keys.dtype.element_ty)
    highest = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    mixed = tl.zeros((TILE, DIMS), dtype=tl.float32)
    for j in range(n_pages):
        page = (tl.load(pages + tile * n_columns + j).to(tl.int64) * n_kv_heads + kv) * width * PAGE
        k = tl.load(keys + page + dim[:, None] * PAGE + key[None, :], mask=dim[:, None] < width, other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        scores = tl.where(j * PAGE + key[None, :] <= position[:, None], scores, float("-inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp(highest - peak)
        weights = tl.exp(scores - peak[:, None])
        v = tl.load(values + page + key[:, None] * width + dim[None, :], mask=dim[None, :] < width, other=0.0)
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
        _attend[(len(plan.tiles), n_kv_heads)](
            queries.contiguous(),
            keys,
            values,
            out,
            plan.tiles,
            plan.row_positions,
            plan.pages,
            plan.pages.shape[1],
            head_dim**-0.5,
            n_heads,
            n_kv_heads,
            head_dim,
            width,
            GROUP=plan.group,
            TILE=TILE,
            PAGE=PAGE,
            DIMS=max(16, triton.next_power_of_2(head_dim)),
            num_warps=4,
            num_stages=2,
        )
    return out
