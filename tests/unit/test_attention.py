"""Attention: the bits of a position depend neither on chunks nor on company, and the values are attention's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from heads import store, turn

from moempi.device import cpu_rows
from moempi.errors import FitError
from moempi.model.attention import Span, plan_attention
from moempi.model.cache import KVCache, pages_for
from moempi.model.ops import Rotary, rms_norm

LENGTHS = [1, 5, 63, 64, 65, 130, 200]
# heads, key-value heads, head_dim; so many heads as share keys are blocks of 6, 4, 2 and 1
HEADS = [(4, 4, 32), (8, 2, 20), (3, 1, 16), (6, 3, 10), (2, 1, 110), (8, 1, 20), (7, 1, 16), (12, 1, 48)]


def draw(heads: int, kv: int, dim: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of every sequence."""
    generator = torch.Generator().manual_seed(dim)
    return [tuple(torch.randn(n, h, dim, generator=generator) for h in (heads, kv, kv)) for n in LENGTHS]  # type: ignore[misc]


def attend(data: list, dtype: torch.dtype, chunk: Callable[[], int], slice_rows: int | None = None) -> list:
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
        store(cache, 0, plan, keys, values)  # without norm and rotation
        n_rows = len(queries)
        step = slice_rows or n_rows
        queries, mixed = queries * dim**-0.5, torch.empty(n_rows, heads * dim, dtype=dtype)
        for lo in range(0, n_rows, step):
            cpu_rows.attend(queries, cache, 0, plan, lo, min(lo + step, n_rows), mixed)
        for (i, n), part in zip(taking, mixed.split([n for _, n in taking]), strict=True):
            outputs[i].append(part)
            done[i] += n
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv,dim", HEADS)
def test_chunks_and_slices_do_not_matter(heads: int, kv: int, dim: int, dtype: torch.dtype) -> None:
    data = draw(heads, kv, dim)
    whole = attend(data, dtype, lambda: 1000)
    rng = random.Random(7)
    ways = [(lambda size=size: size) for size in (3, 16, 50, 64)] + [lambda: rng.randint(1, 70)]
    for number, chunk in enumerate(ways):
        found = attend(data, dtype, chunk, slice_rows=(None, 1, 3)[number % 3])
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)), number


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads,kv,dim", HEADS)
def test_heads_are_normalised_rotated_and_stored(heads: int, kv: int, dim: int, dtype: torch.dtype) -> None:
    n, eps, random = 70, 1e-6, torch.Generator().manual_seed(dim)
    rows = torch.randn(n, heads + 2 * kv, dim, generator=random).to(dtype)
    norm, rotary = torch.randn(heads + kv, dim, generator=random), Rotary(dim, 100, 1e4)
    cache = KVCache(1, kv, dim, 128, dtype)
    plan = plan_attention([Span(0, 66, [1, 0]), Span(3, 7, [1])], heads // kv)
    plan.write_pages[66:], plan.write_offsets[66:] = 0, torch.arange(60, 64)  # where the first one is not
    queries = torch.empty(n, heads, dim)
    for lo, hi in ((0, 5), (5, n)):
        part = rows[lo:hi].reshape(hi - lo, -1)
        cpu_rows.turn_heads(part, norm, (rotary.cos, rotary.sin), plan, lo, cache, 0, queries, eps)
    both = turn(rms_norm(rows[:, : heads + kv], norm, eps), rotary, plan.positions)
    stored = cache.keys[0][plan.write_pages, :, :dim, plan.write_offsets]
    assert torch.allclose(queries, both[:, :heads] * dim**-0.5, atol=1e-6)
    assert torch.allclose(stored.float(), both[:, heads:], atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(cache.values[0][plan.write_pages, :, plan.write_offsets, :dim], rows[:, heads + kv :])


def test_a_plan_worked_by_hand() -> None:
    plan = plan_attention([Span(62, 66, [7, 3, 9]), Span(0, 1, [4])], 2)
    assert plan.positions.tolist() == [62, 63, 64, 65, 0]
    assert plan.lines.tolist() == [0, 0, 0, 0, 1]
    assert plan.pages.tolist() == [[7, 3], [4, 0]]
    assert plan.write_pages.tolist() == [7, 7, 3, 3, 4]
    assert plan.write_offsets.tolist() == [62, 63, 0, 1, 0]


def test_pages_are_taken_and_given_back() -> None:
    cache = KVCache(1, 1, 16, 200, torch.float32)
    assert cache.n_pages == 4
    first = cache.take(65)
    assert len(first) == 2 and cache.has_room(128) and not cache.has_room(129)
    with pytest.raises(FitError, match="129 positions needs 3 KV pages; 2 are free"):
        cache.take(129)
    cache.give_back(first)
    assert cache.has_room(256)
