"""Attention: the bits of a position depend neither on chunks nor on company, and the values are attention's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from moempi.errors import FitError
from moempi.model.attention import Span, attend_tiles, plan_attention, untile
from moempi.model.cache import KVCache, pages_for

LENGTHS = [1, 5, 63, 64, 65, 130, 200]
HEADS = [(4, 4, 32), (8, 2, 20), (3, 1, 16), (6, 3, 10)]  # heads, key-value heads, head_dim


def draw(heads: int, kv: int, dim: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of every sequence."""
    generator = torch.Generator().manual_seed(dim)
    return [tuple(torch.randn(n, h, dim, generator=generator) for h in (heads, kv, kv)) for n in LENGTHS]  # type: ignore[misc]


def attend(data: list, dtype: torch.dtype, chunk: Callable[[], int], slice_tiles: int | None = None) -> list:
    """Attention of all sequences, each taken through in chunks, all together."""
    heads, (kv, dim) = data[0][0].shape[1], data[0][1].shape[1:]
    cache = KVCache(1, kv, dim, 64 * sum(map(pages_for, LENGTHS)), dtype)
    cache.keys.fill_(1e4)  # what an earlier owner of the pages has left
    cache.values.fill_(1e4)
    pages, done = [cache.take(n) for n in LENGTHS], [0] * len(LENGTHS)
    outputs: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    while any(at < n for at, n in zip(done, LENGTHS, strict=True)):
        taking = [(i, min(chunk(), n - at)) for i, (at, n) in enumerate(zip(done, LENGTHS, strict=True)) if at < n]
        spans = [Span(done[i], done[i] + n, pages[i]) for i, n in taking]
        taken = [tuple(x[s.begin : s.end] for x in data[i]) for (i, _), s in zip(taking, spans, strict=True)]
        queries, keys, values = (torch.cat(parts) for parts in zip(*taken, strict=True))
        plan = plan_attention(spans, heads // kv)
        cache.write(0, plan.write_pages, plan.write_offsets, keys, values)
        n_tiles = len(plan.rows)
        step = slice_tiles or n_tiles
        tiles = [attend_tiles(queries, cache, 0, plan, lo, min(lo + step, n_tiles)) for lo in range(0, n_tiles, step)]
        parts = untile(torch.cat(tiles), plan, len(queries)).split([n for _, n in taking])
        for (i, n), part in zip(taking, parts, strict=True):
            outputs[i].append(part)
            done[i] += n
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv,dim", HEADS)
def test_chunks_slices_and_threads_do_not_matter(heads: int, kv: int, dim: int, dtype: torch.dtype) -> None:
    data = draw(heads, kv, dim)
    torch.set_num_threads(1)
    whole = attend(data, dtype, lambda: 1000)
    rng = random.Random(7)
    ways = [(lambda size=size: size) for size in (3, 16, 50, 64)] + [lambda: rng.randint(1, 70)]
    for number, chunk in enumerate(ways):
        torch.set_num_threads(1 + number % 2)
        found = attend(data, dtype, chunk, slice_tiles=(None, 1, 3)[number % 3])
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)), number
    torch.set_num_threads(1)


def test_a_token_at_a_time() -> None:
    data = draw(4, 2, 16)
    whole, single = attend(data, torch.float32, lambda: 1000), attend(data, torch.float32, lambda: 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))


@pytest.mark.parametrize("heads,kv,dim", HEADS)
def test_it_is_causal_attention(heads: int, kv: int, dim: int) -> None:
    data = draw(heads, kv, dim)
    for (q, k, v), found in zip(data, attend(data, torch.float32, lambda: 1000), strict=True):
        k, v = (x.repeat_interleave(heads // kv, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1).double() for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(found), -1)
        assert (expected - found).abs().max() < 3e-6


def test_pages_are_taken_and_given_back() -> None:
    cache = KVCache(1, 1, 16, 200, torch.float32)
    assert cache.n_pages == 4
    first = cache.take(65)
    assert len(first) == 2 and cache.has_room(128) and not cache.has_room(129)
    with pytest.raises(FitError, match="129 positions needs 3 KV pages; 2 are free"):
        cache.take(129)
    cache.give_back(first)
    assert cache.has_room(256)
