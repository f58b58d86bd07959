"""Causal attention whose bits are the same in prefill, in chunks, in decode and after a restart.

Queries stand in tiles of 8 rows, keys in blocks of 64 counted from position 0, and the online softmax
(Milakov and Gimelshein, 2018) goes through the blocks in order. Every product then has one fixed shape,
and a block that is masked for a row leaves that row as it was: multiplied by one, plus zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moempi.model.cache import KVCache, padded_head
from moempi.model.config import PAGE

TILE = 8  # query rows


@dataclass(frozen=True)
class Span:
    """New positions [begin, end) of one sequence, whose keys and values lie in `pages`."""

    begin: int
    end: int
    pages: Sequence[int]


@dataclass(frozen=True)
class AttentionPlan:
    """Which rows meet which blocks, for the T new positions of a batch; the same for every layer.

    A *query row* is a (position, head of the group) pair of one sequence: the heads that share a
    key-value head stand in the same tile. Tiles are sorted by their number of blocks, longest first, so
    that those which still have a block j are the first `active[j]`.
    """

    positions: Tensor  # [T] position in its sequence
    write_pages: Tensor  # [T] page of each new position
    write_offsets: Tensor  # [T] place in the page
    rows: Tensor  # [A, TILE] query row in a tile: T-index * group + head; padding repeats row 0
    places: Tensor  # [T * group] place of each query row among the A * TILE
    pages: Tensor  # [A, blocks] pages of a tile's sequence; padding 0
    active: tuple[int, ...]  # tiles that have a block j
    hidden: tuple[Tensor | None, ...]  # [active, 1, TILE, PAGE] what their rows must not see of block j; None: nothing


def plan_attention(spans: Sequence[Span], group: int) -> AttentionPlan:
    """Tiles and blocks for the new positions of several sequences.

    Args:
        spans: one per sequence, in the order of their rows in the batch.
        group: query heads per key-value head.
    """
    positions, owners, tiles = [], [], []
    first = 0
    for number, span in enumerate(spans):
        n = span.end - span.begin
        positions.append(np.arange(span.begin, span.end))
        owners.append(np.full(n, number))
        rows = np.arange(first * group, (first + n) * group)
        tiles += [(number, rows[i : i + TILE]) for i in range(0, len(rows), TILE)]
        first += n
    position = np.concatenate(positions)
    last = [int(position[rows[-1] // group]) for _, rows in tiles]
    order = sorted(range(len(tiles)), key=lambda i: -(last[i] // PAGE))
    n_blocks = [last[i] // PAGE + 1 for i in order]

    tile_rows = np.zeros((len(tiles), TILE), dtype=np.int64)
    row_positions = np.zeros((len(tiles), TILE), dtype=np.int64)
    pages = np.zeros((len(tiles), n_blocks[0]), dtype=np.int64)
    places = np.zeros(len(position) * group, dtype=np.int64)
    for at, tile in enumerate(order):
        number, rows = tiles[tile]
        tile_rows[at, : len(rows)] = rows
        row_positions[at] = last[tile]
        row_positions[at, : len(rows)] = position[rows // group]
        pages[at, : n_blocks[at]] = spans[number].pages[: n_blocks[at]]
        places[rows] = at * TILE + np.arange(len(rows))
    owner = np.concatenate(owners)
    write_pages = np.array([spans[s].pages[p // PAGE] for s, p in zip(owner, position, strict=True)], dtype=np.int64)
    active = tuple(sum(n > j for n in n_blocks) for j in range(n_blocks[0]))
    return AttentionPlan(
        positions=torch.from_numpy(position),
        write_pages=torch.from_numpy(write_pages),
        write_offsets=torch.from_numpy(position % PAGE),
        rows=torch.from_numpy(tile_rows),
        places=torch.from_numpy(places),
        pages=torch.from_numpy(pages),
        active=active,
        hidden=tuple(_hide_future(row_positions[:n], block) for block, n in enumerate(active)),
    )


def _hide_future(row_positions: np.ndarray, block: int) -> Tensor | None:
    """Mask of a block for tiles whose rows stand at positions [A, TILE]."""
    if row_positions.min() >= (block + 1) * PAGE - 1:
        return None
    keys = np.arange(block * PAGE, (block + 1) * PAGE)
    return torch.from_numpy(keys > row_positions[:, None, :, None])


def attend_tiles(queries: Tensor, cache: KVCache, layer: int, plan: AttentionPlan, lo: int, hi: int) -> Tensor:
    """Attention of the tiles [lo, hi) of a plan; keys and values of the batch must be in the cache already.

    Args:
        queries: [T, heads, head_dim] float32, normalised and rotated, not yet scaled.

    Returns:
        [hi - lo, kv_heads, TILE, head_dim] float32.
    """
    n_kv_heads, head_dim = cache.keys.shape[2], queries.shape[-1]
    tiles = _tile_queries(queries, plan.rows[lo:hi], n_kv_heads)  # [A, kv, TILE, width]
    for block, active in enumerate(plan.active):
        n = min(active, hi) - lo
        if n <= 0:
            break
        pages, hidden = plan.pages[lo : lo + n, block], plan.hidden[block]
        scores = _products(tiles[:n], cache.keys[layer].index_select(0, pages).float())  # [n, kv, TILE, PAGE]
        if hidden is not None:
            scores = scores.masked_fill(hidden[lo : lo + n], -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        values = cache.values[layer].index_select(0, pages).float()
        if block == 0:
            highest = peak
            weights = torch.exp(scores - peak)
            total, output = weights.sum(-1, keepdim=True), _products(weights, values)
            continue
        peak = torch.maximum(highest[:n], peak)
        scale = torch.exp(highest[:n] - peak)
        weights = torch.exp(scores - peak)
        total[:n] = total[:n] * scale + weights.sum(-1, keepdim=True)
        output[:n] = output[:n] * scale + _products(weights, values)
        highest[:n] = peak
    return (output / total)[..., :head_dim]


def untile(tiles: Tensor, plan: AttentionPlan, n_tokens: int) -> Tensor:
    """Tiles [A, kv_heads, TILE, head_dim] -> [T, heads * head_dim]."""
    _, n_kv_heads, _, head_dim = tiles.shape
    rows = tiles.transpose(1, 2).reshape(-1, n_kv_heads, head_dim)[plan.places]  # [T * group, kv, head_dim]
    group = len(plan.places) // n_tokens
    return rows.view(n_tokens, group, n_kv_heads, head_dim).transpose(1, 2).reshape(n_tokens, -1)


def _tile_queries(queries: Tensor, rows: Tensor, n_kv_heads: int) -> Tensor:
    n_tokens, n_heads, head_dim = queries.shape
    group = n_heads // n_kv_heads
    by_row = (queries * head_dim**-0.5).view(n_tokens, n_kv_heads, group, head_dim).transpose(1, 2)
    tiles = by_row.reshape(n_tokens * group, n_kv_heads, head_dim)[rows].transpose(1, 2)
    width = padded_head(head_dim)
    return torch.nn.functional.pad(tiles, (0, width - head_dim)).contiguous()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """[A, kv, m, k] x [A, kv, k, n] as one batch of products of one fixed shape."""
    a, kv, m, k = left.shape
    return torch.bmm(left.reshape(a * kv, m, k), right.reshape(a * kv, k, -1)).view(a, kv, m, -1)
