"""Every kernel of the GPU against a float64 reference, on random and odd shapes, and bits that see one row alone."""

from __future__ import annotations

import operator
import random as python_random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from gpu_device import DEVICE, MISSING
from heads import store, turn
from torch import Tensor

if MISSING:
    pytest.skip(MISSING, allow_module_level=True)

from moempi.device import cuda_experts, cuda_rows
from moempi.device.cuda import Cuda, Linear, row_is_independent
from moempi.device.cuda_attention import attend, tiles_agree
from moempi.device.cuda_clock import Clock
from moempi.device.cuda_experts import Scratch, Stack, parts_of
from moempi.device.cuda_graphs import Graphs
from moempi.device.cuda_memory import Rows
from moempi.device.cuda_products import product
from moempi.device.cuda_source_routes import WORDS
from moempi.device.cuda_transfer import all_to_device, words_of
from moempi.device.product_tiles import TILES
from moempi.device.seam import ProductShape
from moempi.device.tile_plan import TILE, WIDE_TILE, TilePlan, plan_tiles
from moempi.exchange.arrivals import Arrival
from moempi.exchange.plan import header_places
from moempi.exchange.slots import layer_tables
from moempi.model import gate
from moempi.model.attention import Span
from moempi.model.cache import KVCache, pages_for
from moempi.model.ops import Rotary
from moempi.planning.gpu_memory import GRAPH_SHAPES
from moempi.planning.placement import Placement

DTYPES = [torch.float32, torch.bfloat16]
# Relative to the norm of the reference: one rounding to the dtype, and sums in float32.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


def draw(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=random, device=DEVICE).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def on_gpu(plan: TilePlan) -> TilePlan:
    tensors = plan.tensors()
    return replace(plan, **all_to_device(tensors, torch.empty(words_of(tensors), dtype=torch.int64, device=DEVICE)))


def batch(rows: Rows, answer: Rows, rows_per_slot: tuple[int, ...], counts: int = 0) -> Arrival:
    return Arrival(0, 0, 0, 0, rows, answer, rows_per_slot, len(rows), counts=counts)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected; not a number where anything was not written."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n,d", [(1, 1), (3, 7), (5, 20), (33, 64), (4, 128), (130, 7168), (2, 129), (6, 300), (7, 264), (3, 9000)]
)
def test_rms_norm(random: torch.Generator, n: int, d: int, dtype: torch.dtype) -> None:
    x, weight = draw(random, n, d, dtype=dtype), draw(random, d)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    found = cuda_rows.rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype and error(found, expected) < CLOSE[dtype]
    assert torch.equal(cuda_rows.rms_norm(x[-1:].clone(), weight, 1e-6), found[-1:])


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,f", [(0, 8), (1, 1), (7, 33), (64, 768), (300, 2048)])
def test_swiglu(random: torch.Generator, rows: int, f: int, dtype: torch.dtype) -> None:
    x = draw(random, rows, 2 * f, dtype=dtype) * 4
    gated, up = x.double().chunk(2, dim=-1)
    found = cuda_rows.swiglu(x)
    assert found.shape == (rows, f) and found.dtype == dtype
    if rows:
        assert error(found, gated / (1 + torch.exp(-gated)) * up) < CLOSE[dtype]
        assert torch.equal(cuda_rows.swiglu(x[-1:].clone()), found[-1:])


def sort_pairs(covers: Tensor, n_covers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs, places and counts where every expert is a cover; the counts land in memory of the host.

    The tokens that come out are those of the pairs.
    """
    turns = torch.zeros(len(covers), dtype=torch.int64, device=DEVICE)
    cover_of = torch.arange(n_covers, dtype=torch.int32, device=DEVICE).unsqueeze(1)
    counts = torch.full((n_covers,), -1, dtype=torch.int64, pin_memory=True)
    places, tokens = torch.full_like(covers, 12345), torch.full_like(covers, 12345).flatten()
    cuda_rows.sort_pairs(covers, turns, cover_of, torch.ones_like(cover_of), 0, counts, places, tokens=tokens)
    torch.cuda.synchronize()
    pairs = torch.full_like(tokens, -1)
    pairs[places.flatten().long()] = torch.arange(len(pairs), dtype=torch.int32, device=DEVICE)
    assert torch.equal(tokens, pairs // covers.shape[1])
    return pairs, places, counts


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,k,d", [(1, 1, 1), (5, 2, 33), (64, 4, 128), (257, 8, 7168), (4099, 9, 8)])
def test_sort_pack_combine(random: torch.Generator, tokens: int, k: int, d: int, dtype: torch.dtype) -> None:
    """Rows go out by cover and come back: as torch sorts them, and the sum of a token in the order of k."""
    n_covers = 11
    covers = torch.randint(0, n_covers, (tokens, k), generator=random, device=DEVICE, dtype=torch.int32)
    pairs, places, counts = sort_pairs(covers, n_covers)
    flat = covers.flatten().long()
    assert torch.equal(pairs.long(), flat.argsort(stable=True))
    assert torch.equal(counts, flat.bincount(minlength=n_covers).cpu())
    assert torch.equal(places.flatten()[pairs.long()].long(), torch.arange(tokens * k, device=DEVICE))
    x, weights = draw(random, tokens, d, dtype=dtype), torch.rand(tokens, k, generator=random, device=DEVICE)
    rows = poisoned(tokens * k, d, dtype=dtype)
    again = torch.zeros_like(rows)
    cuda_rows.scatter(x, places, rows.data_ptr())
    cuda_rows.gather(x, pairs // k, again.data_ptr())
    assert torch.equal(rows, x[pairs.long() // k]) and torch.equal(again, rows)
    for answers in (rows * 3, rows.float() * 3):
        found = cuda_rows.combine(x, answers, places, weights)
        ordered = answers[places.flatten().long()].view(tokens, k, d)
        expected = x.double() + (ordered.double() * weights.double().unsqueeze(-1)).sum(1)
        assert error(found, expected) < CLOSE[dtype]
        total = ordered[:, 0].float() * weights[:, :1]
        for j in range(1, k):
            total = total + ordered[:, j].float() * weights[:, j : j + 1]
        assert torch.equal(found, (x.float() + total).to(dtype)), "not the bits of the order of k, rounded once"


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,padding,k,d", [(1, 15, 1, 1), (17, 15, 4, 33), (300, 212, 8, 256)])
def test_padding_is_not_sorted_packed_or_combined(
    random: torch.Generator, tokens: int, padding: int, k: int, d: int, dtype: torch.dtype
) -> None:
    """What comes behind the tokens has turn -1: the rest is as it is without, and its own rows are left alone."""
    n, n_covers = tokens + padding, 7
    experts = torch.randint(0, n_covers, (n, k), generator=random, device=DEVICE, dtype=torch.int32)
    turns = torch.arange(n, device=DEVICE).where(torch.arange(n, device=DEVICE) < tokens, -1)
    cover_of = torch.arange(n_covers, dtype=torch.int32, device=DEVICE).unsqueeze(1)
    counts = torch.full((n_covers,), -1, dtype=torch.int64, pin_memory=True)
    places = torch.full((n, k), 12345, dtype=torch.int32, device=DEVICE)
    cuda_rows.sort_pairs(experts, turns, cover_of, torch.ones_like(cover_of), 0, counts, places)
    torch.cuda.synchronize()
    alone, alone_places, alone_counts = sort_pairs(experts[:tokens], n_covers)
    assert torch.equal(counts, alone_counts)
    assert torch.equal(places[:tokens], alone_places) and (places[tokens:] == -1).all()
    x, weights = draw(random, n, d, dtype=dtype), torch.rand(n, k, generator=random, device=DEVICE)
    rows = poisoned(n * k, d, dtype=dtype)
    cuda_rows.scatter(x, places, rows.data_ptr())
    assert torch.equal(rows[: tokens * k], x[alone.long() // k]) and rows[tokens * k :].isnan().all()
    found = cuda_rows.combine(x, rows, places, weights)
    assert torch.equal(found[:tokens], cuda_rows.combine(x[:tokens], rows, alone_places, weights[:tokens]))
    assert torch.equal(found[tokens:], x[tokens:])


@pytest.mark.row_kernels
@pytest.mark.parametrize("padding", [0, 16])
@pytest.mark.parametrize("tokens,k", [(1, 1), (17, 4), (300, 8)])
def test_headers_lie_ahead_of_the_rows_of_each_rank(random: torch.Generator, tokens: int, k: int, padding: int) -> None:
    """Seven slots on three of four ranks, of which one holds one slot; a header is three rows of 8 words."""
    slots = {"layer": [0] * 7, "expert": range(7), "replica": [0] * 7, "lo": [0] * 7, "hi": [1] * 7}
    placement = Placement.from_slots(4, 7, 1, (0,), {**slots, "rank": [0, 0, 0, 1, 3, 3, 3]})
    table, each, d = layer_tables(placement)[0], 3, 8
    n, total = tokens * k, 3 * each
    experts = torch.randint(0, 6, (tokens + padding, k), generator=random, device=DEVICE, dtype=torch.int32)
    turns = torch.zeros(tokens + padding, dtype=torch.int64, device=DEVICE)
    turns[tokens:] = -1
    cover_of = torch.arange(7, dtype=torch.int32, device=DEVICE).unsqueeze(1)
    counts = torch.full((7,), -1, dtype=torch.int64, pin_memory=True)
    packed = torch.full((n + total, d), -7, dtype=torch.int32, device=DEVICE)
    of_slots = torch.from_numpy(header_places(table, each)).to(DEVICE)
    headers = cuda_rows.Headers(of_slots, packed.data_ptr(), 4 * d)
    places = torch.full_like(experts, 12345)
    cuda_rows.sort_pairs(experts, turns, cover_of, torch.ones_like(cover_of), 0, counts, places, headers)
    torch.cuda.synchronize()
    alone, _, alone_counts = sort_pairs(experts[:tokens], 7)
    assert torch.equal(counts, alone_counts)
    found = torch.full((n + total,), -1, dtype=torch.int32)
    found[places[:tokens].flatten().long().cpu()] = torch.arange(n, dtype=torch.int32)
    x = draw(random, tokens + padding, d)
    rows = packed.view(torch.float32)
    cuda_rows.scatter(x, places, packed.data_ptr())
    assert torch.equal(rows[places[:tokens].flatten().long()], x[:tokens].repeat_interleave(k, 0))
    expected, lo = [], 0
    for rank in (0, 1, 3):
        mine = counts[table.rank_begin[rank] : table.rank_begin[rank + 1]].tolist()
        header = packed.view(-1)[: (len(expected) + each) * d][-16:].tolist()
        assert header == ([*mine, *[-7] * 13] if len(mine) > 1 else [-7] * 16)
        expected += [-1] * each + alone[lo : lo + sum(mine)].tolist()
        lo += sum(mine)
    assert found.tolist() == expected
    assert (places[tokens:] == -1).all()


@pytest.mark.row_kernels
@pytest.mark.parametrize("tokens,e,k", [(1, 1, 1), (9, 5, 2), (33, 128, 8), (1000, 64, 6), (3, 3000, 9)])
@pytest.mark.parametrize("normalize", [True, False])
def test_choose_experts(random: torch.Generator, tokens: int, e: int, k: int, normalize: bool) -> None:
    logits = draw(random, tokens, e)
    experts, weights = cuda_rows.choose_experts(logits, k, normalize)
    expected = gate.choose_experts(logits.cpu().double(), k, normalize)
    assert torch.equal(experts.cpu().long(), expected.experts)
    assert error(weights.cpu(), expected.weights) < 1e-5
    alone = cuda_rows.choose_experts(logits[-1:].clone(), k, normalize)
    assert torch.equal(alone[0], experts[-1:]) and torch.equal(alone[1], weights[-1:])


@pytest.mark.row_kernels
def test_equal_scores_go_to_the_lowest_index() -> None:
    experts, _ = cuda_rows.choose_experts(torch.zeros(3, 70, device=DEVICE), 4, True)
    assert experts.tolist() == [[0, 1, 2, 3]] * 3
    tokens, logprobs = cuda_rows.greedy(torch.zeros(2, 5000, device=DEVICE))
    assert tokens.tolist() == [0, 0] and torch.allclose(logprobs.exp(), torch.tensor(1 / 5000, device=DEVICE))


@pytest.mark.row_kernels
def test_replicas_take_turns() -> None:
    """Covers [[0, 2], [1, 0], [0, 2]]: expert 1 has two replicas, and turn + layer is 5, 6, 7."""
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32, device=DEVICE)
    cover_of = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32, device=DEVICE)
    replicas = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    counts, turns = torch.zeros(3, dtype=torch.int64, pin_memory=True), torch.tensor([4, 5, 6], device=DEVICE)
    places, tokens = torch.empty_like(experts), torch.empty_like(experts).flatten()
    cuda_rows.sort_pairs(experts, turns, cover_of, replicas, 1, counts, places, tokens=tokens)
    assert tokens.tolist() == [0, 1, 2, 1, 0, 2] and places.tolist() == [[0, 4], [3, 1], [2, 5]]
    assert counts.tolist() == [3, 1, 2]


def test_a_clock_calls_back_in_order_behind_the_work_of_its_stream() -> None:
    stream, called = torch.cuda.Stream(), []
    clock = Clock(stream)
    x = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    landing = torch.zeros(1, dtype=torch.int64, pin_memory=True)
    torch.cuda.synchronize()
    for i in range(50):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000)
            x += 1
            landing.copy_(x, non_blocking=True)
        clock.after(lambda i=i: called.append((i, int(landing[0]) > i)))
    while clock:
        clock.look()
    assert called == [(i, True) for i in range(50)]


@pytest.mark.row_kernels
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("s,v", [(1, 1), (3, 37), (65, 1024), (5, 151936)])
def test_greedy(random: torch.Generator, s: int, v: int, pinned: bool) -> None:
    """Into memory of the GPU, or of the host and the tokens into the GPU's as well."""
    logits, out = draw(random, s, v) * 5, None
    if pinned:
        types = torch.int64, torch.float32
        out = tuple(torch.full((s,), -1, dtype=dtype, pin_memory=True) for dtype in types)
    copy = torch.full((s,), -1, device=DEVICE)
    found = cuda_rows.greedy(logits, out, copy if pinned else None)
    torch.cuda.synchronize()
    assert out is None or all(map(operator.is_, found, out))
    tokens, logprobs = (tensor.to(DEVICE) for tensor in found)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(copy, tokens if pinned else torch.full_like(tokens, -1))
    expected = torch.log_softmax(logits.double(), -1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert (logprobs.double() - expected).abs().max() < 1e-5
    assert torch.equal(cuda_rows.greedy(logits[-1:].clone())[1], logprobs[-1:])


@pytest.mark.row_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_shows(bad: float) -> None:
    logits = torch.zeros(2, 100, device=DEVICE)
    logits[1, 7] = bad
    logprobs = cuda_rows.greedy(logits)[1]
    assert logprobs[0].isfinite() and logprobs[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs,inputs", [(1, 1), (5, 7), (33, 65), (128, 64), (768, 2048), (300, 1000)])
def test_exact_products(random: torch.Generator, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    """The values of a product, and of every row the same bits for any number of rows, place and tile.

    Rounded to the dtype, and in float32 as a gate has them.
    """
    for out in {dtype, torch.float32}:
        assert row_is_independent(ProductShape(outputs, inputs, dtype, out), torch.device(DEVICE))
    weight, row = draw(random, outputs, inputs, dtype=dtype), draw(random, 1, inputs, dtype=dtype)
    alone = product(row, weight)[0]
    assert error(alone, row[0].double() @ weight.double().T) < CLOSE[dtype]
    for n in (2, 3, 16, 63, 65, 128, 300):
        x = draw(random, n, inputs, dtype=dtype)
        for place in (0, n // 2, n - 1):
            x[place] = row[0]
        for tile in TILES[dtype]:
            found = product(x, weight, tile)
            assert error(found, x.double() @ weight.double().T) < CLOSE[dtype]
            unrounded = product(x, weight, tile, torch.float32)
            assert error(unrounded, x.double() @ weight.double().T) < CLOSE[torch.float32]
            assert torch.equal(unrounded.to(dtype), found)
            assert all(torch.equal(found[place], alone) for place in (0, n // 2, n - 1)), (n, tile)


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,d", [(1, 1), (3, 37), (65, 256), (7, 7168), (5, 300), (9, 264), (3, 9000)])
def test_sum_and_norm_have_the_bits_of_each(random: torch.Generator, n: int, d: int, dtype: torch.dtype) -> None:
    residual, rows, weight = (draw(random, *shape, dtype=t) for shape, t in
                              (((n, d), dtype), ((n, d), dtype), ((d,), torch.float32)))  # fmt: skip
    total, normed = poisoned(n, d, dtype=dtype), poisoned(n, d, dtype=dtype)
    cuda_rows.add_norm(residual, rows, weight, 1e-6, total, normed)
    assert torch.equal(total, residual + rows)
    assert torch.equal(normed, cuda_rows.rms_norm(residual + rows, weight, 1e-6))


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 45])
@pytest.mark.parametrize(
    "heads,kv,dim",
    [(4, 4, 32), (8, 2, 20), (3, 1, 16), (6, 3, 10), (32, 4, 128), (4, 2, 72), (4, 2, 74), (4, 2, 96), (4, 2, 512)],
)
def test_heads_are_turned_and_written(
    random: torch.Generator, heads: int, kv: int, dim: int, n: int, dtype: torch.dtype
) -> None:
    """As norm, rotation and cache have it one after the other; nothing else of the cache is touched.

    A token's bits are the same alone and among others.
    """
    rows, norm = draw(random, n, (heads + 2 * kv) * dim, dtype=dtype), draw(random, heads + kv, dim)
    rotary, spans = Rotary(dim, 200, 1e4, lambda tensor: tensor.to(DEVICE)), [Span(60, 60 + n, [2, 0])]
    plan = on_gpu(plan_tiles(spans, heads // kv))
    plain, cache, again = (KVCache(2, kv, dim, 3 * 64, dtype, torch.device(DEVICE)) for _ in range(3))
    both, values = rows.view(n, -1, dim).split([heads + kv, kv], dim=1)
    wide = both.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.double()
    queries, keys = turn(normed, rotary, plan.positions).split([heads, kv], dim=1)
    store(plain, 1, plan, keys, values)
    tables = rotary.cos, rotary.sin
    found = cuda_rows.turn_heads(rows, norm, 1e-6, tables, plan, cache.keys[1], cache.values[1])
    assert found.dtype == dtype and error(found, queries * dim**-0.5) < CLOSE[dtype]
    assert error(cache.keys, plain.keys.double()) < 2 * CLOSE[dtype], "both are rounded"
    assert torch.equal(cache.keys == 0, plain.keys == 0) and torch.equal(cache.values, plain.values)
    for t in range(n):
        alone = on_gpu(plan_tiles([Span(60 + t, 61 + t, [2, 0])], heads // kv))
        one = cuda_rows.turn_heads(rows[t : t + 1].clone(), norm, 1e-6, tables, alone, again.keys[1], again.values[1])
        assert torch.equal(one[0], found[t])
    assert torch.equal(cache.keys, again.keys) and torch.equal(cache.values, again.values)


@pytest.mark.row_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("d,hidden,more", [(32, 16, 0), (37, 9, 0), (32, 12, 0), (64, 32, 1100)])
def test_experts_find_the_rows_of_every_batch_and_slot(
    random: torch.Generator, d: int, hidden: int, more: int, dtype: torch.dtype, exact: bool
) -> None:
    """Several arrivals of a layer with empty slots among them: every row meets its own expert, alone or together.

    Of some the host knows the rows per slot, of some the GPU alone.
    """
    n_slots = 5 + more
    gate_up, down = draw(random, n_slots, 2 * hidden, d, dtype=dtype), draw(random, n_slots, d, hidden, dtype=dtype)
    counts = [(3, 0, 70, 1, 0), (0, 0, 0, 0, 9), (1, 1, 1, 1, 1), (0, 2, 0, 0, 0)]
    counts = [(*per_slot, *[i % 2] * more) for i, per_slot in enumerate(counts)]
    total = sum(map(sum, counts))
    memory = draw(random, 2 * total, d, dtype=dtype)
    flat, batches, slots, lo = memory.view(-1), [], [], 0
    headers, unknown = [], []
    for per_slot in counts:
        n = sum(per_slot)
        places = Rows(flat, lo * d, n, d), Rows(flat, (total + lo) * d, n, d)
        batches.append(batch(*places, per_slot))
        headers.append(torch.tensor(per_slot, dtype=torch.int32, device=DEVICE))
        unknown.append(batch(*places, (), headers[-1].data_ptr()))
        slots += [slot for slot, rows in enumerate(per_slot) for _ in range(rows)]
        lo += n
    stack, stream = Stack(gate_up, down, exact=exact, scratch=Scratch()), torch.cuda.Stream()
    products = {}
    # Together, few at once; rows that fit one tile of every slot: launched, recorded, and replayed.
    some = batches[0], unknown[1], batches[2], unknown[3]
    for given in (batches, unknown, some, batches[:1], unknown[:1], batches[3:], *[batches[1:], unknown[1:]] * 4):
        memory[total:] = torch.nan
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):  # nothing is recorded on the default one
            stack(given, flat)
        torch.cuda.synchronize()
        for i, slot in enumerate(slots):
            if any(b.rows.begin <= i * d < b.rows.begin + len(b.rows) * d for b in given):
                gate, up = (gate_up[slot].double() @ memory[i].double()).chunk(2)
                expected = down[slot].double() @ (F.silu(gate) * up)
                assert error(memory[total + i], expected) < 4 * CLOSE[dtype]
                assert torch.equal(memory[total + i], products.setdefault(i, memory[total + i].clone()))
            else:
                assert memory[total + i].isnan().all()


@pytest.mark.row_kernels
@pytest.mark.parametrize("n_slots", [1, 3])
def test_a_call_has_more_batches_than_words_go_along_with_a_launch(random: torch.Generator, n_slots: int) -> None:
    """Of every third the host alone knows the rows per slot; each has the bits that it has by itself."""
    d, n, per_slot, batches = 32, WORDS // 3 + 9, (2, 0, 1)[:n_slots], []
    rows = sum(per_slot)
    gate_up, down = draw(random, n_slots, 2 * 16, d), draw(random, n_slots, d, 16)
    memory, counts = draw(random, 2 * n * rows, d), torch.tensor(per_slot, dtype=torch.int32, device=DEVICE)
    flat, answers = memory.view(-1), memory[n * rows :]
    for i in range(n):
        known = (per_slot, 0) if i % 3 == 0 or n_slots == 1 else ((), counts.data_ptr())
        places = (Rows(flat, (first + i * rows) * d, rows, d) for first in (0, n * rows))
        batches.append(batch(*places, *known))
    stack = Stack(gate_up, down, exact=True, scratch=Scratch())
    with torch.cuda.stream(torch.cuda.Stream()):
        for one in batches:
            stack([one], flat)
        expected = answers.clone()
        for _ in range(3):
            answers.fill_(torch.nan)
            stack(batches, flat)
            assert torch.equal(answers, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d,hidden", [(64, 96), (37, 9)])
def test_experts_have_the_same_bits_by_every_tile(
    random: torch.Generator, monkeypatch: pytest.MonkeyPatch, d: int, hidden: int, dtype: torch.dtype
) -> None:
    """More rows than a recorded call has, of two homes, with an empty slot and a full one: those of one part alone."""
    counts = [(300, 0, 1), (130, 0, 257)]
    gate_up, down = draw(random, 3, 2 * hidden, d, dtype=dtype), draw(random, 3, d, hidden, dtype=dtype)
    n = [sum(each) for each in counts]
    memory = draw(random, 2 * sum(n), d, dtype=dtype)
    flat, answers = memory.view(-1), memory[sum(n) :]
    begins = 0, n[0]
    batches = [
        batch(Rows(flat, begin * d, rows, d), Rows(flat, (sum(n) + begin) * d, rows, d), of_slots)
        for begin, rows, of_slots in zip(begins, n, counts, strict=True)
    ]
    stack = Stack(gate_up, down, exact=True, scratch=Scratch())
    for part in parts_of(batches):
        stack._alone(part, fixed=True)
    expected = answers.clone()
    for tile in TILES[dtype]:
        monkeypatch.setattr(cuda_experts, "tile_for", lambda *_, tile=tile: tile)
        answers.fill_(torch.nan)
        stack(batches, flat)
        assert torch.equal(answers, expected), tile


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("n", [0, 1, 65])
def test_a_gate_rounds_nothing(random: torch.Generator, n: int, exact: bool) -> None:
    """Rows and weight in bfloat16, scores in float32: in one mode by a kernel of our own, in the other by cuBLAS."""
    x, weight = (draw(random, rows, 256, dtype=torch.bfloat16) for rows in (n, 60))
    found = Linear(weight, exact=exact, out=torch.float32)(x)
    assert found.dtype == torch.float32 and found.shape == (n, 60)
    assert not n or error(found, x.double() @ weight.double().T) < CLOSE[torch.float32]


def test_graphs_do_again_what_they_recorded(random: torch.Generator) -> None:
    """More shapes than are kept, in turns: every result is that of work done there and then.

    Between turns 60 and 80 the last recording goes, and with it their memory; then some are made anew.
    """
    x, graphs = torch.zeros(64, 40, device=DEVICE), Graphs()
    weight, stream = draw(random, 40, 40), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for turn in range(100):
            n = 1 + turn % (3 if (turn % 80 >= 20 and turn % 80 < 60) or turn >= 80 else GRAPH_SHAPES + 2)
            x.copy_(draw(random, 64, 40))
            for part in range(2):
                rows = x[:n]
                found = graphs.run(n, part, lambda rows=rows, part=part: product(rows, weight) + part)
                assert torch.equal(found, product(rows, weight) + part), (turn, part)


LENGTHS = [1, 5, 63, 64, 65, 130, 200]


def attention(data: list, dtype: torch.dtype, chunk: Callable[[], int], tile: int) -> list[Tensor]:
    """Attention of all sequences, each taken through in chunks, all together, by tiles of so many rows."""
    heads, (kv, dim) = data[0][0].shape[1], data[0][1].shape[1:]
    cache = KVCache(1, kv, dim, 64 * sum(map(pages_for, LENGTHS)), dtype, torch.device(DEVICE))
    cache.keys.fill_(1e4)  # what an earlier owner of the pages has left
    cache.values.fill_(1e4)
    pages, done = [cache.take(n) for n in LENGTHS], [0] * len(LENGTHS)
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    while any(at < n for at, n in zip(done, LENGTHS, strict=True)):
        taking = [(i, min(chunk(), n - done[i])) for i, n in enumerate(LENGTHS) if done[i] < n]
        spans = [Span(done[i], done[i] + n, pages[i]) for i, n in taking]
        taken = [tuple(x[s.begin : s.end] for x in data[i]) for (i, _), s in zip(taking, spans, strict=True)]
        queries, keys, values = (torch.cat(parts) for parts in zip(*taken, strict=True))
        plan = on_gpu(plan_tiles(spans, heads // kv, tile))
        store(cache, 0, plan, keys, values)
        queries = (queries * queries.shape[-1] ** -0.5).to(dtype)
        found = attend(queries, cache.keys[0], cache.values[0], plan).split([n for _, n in taking])
        for (i, n), part in zip(taking, found, strict=True):
            outputs[i].append(part)
            done[i] += n
    return [torch.cat(parts) for parts in outputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv,dim", [(4, 4, 32), (8, 2, 20), (3, 1, 16), (6, 3, 10), (32, 4, 128)])
def test_attention(random: torch.Generator, heads: int, kv: int, dim: int, dtype: torch.dtype) -> None:
    """Attention's values, and the same bits whole, in chunks, and a token at a time, whatever the tile."""
    data = [tuple(draw(random, n, h, dim) for h in (heads, kv, kv)) for n in LENGTHS]
    rng = python_random.Random(7)
    wide = WIDE_TILE if dtype == torch.bfloat16 else TILE
    whole = attention(data, dtype, lambda: 1000, wide)
    for most, tile in ((1, TILE), (3, TILE), (16, wide), (70, TILE), (70, wide)):
        found = attention(data, dtype, lambda most=most: rng.randint(1, most), tile)
        assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True)), (most, tile)
    for (q, k, v), mine in zip(data, whole, strict=True):
        k, v = (x.to(dtype).repeat_interleave(heads // kv, dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1).double() for x in (q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(mine), -1)
        assert error(mine, expected) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("heads,kv,dim", [(4, 4, 32), (8, 2, 20), (32, 4, 128)])
def test_attentions_tiles_agree(heads: int, kv: int, dim: int) -> None:
    """In bfloat16; float32 takes small ones only."""
    assert tiles_agree(heads, kv, dim, torch.bfloat16, torch.device(DEVICE))


def test_the_device_tests_itself() -> None:
    device = Cuda(0, "exact")
    narrow, wide = torch.bfloat16, torch.float32
    shapes = (5, 7, wide, wide), (128, 64, narrow, narrow), (128, 64, narrow, wide)
    device.choose_products(ProductShape(*shape) for shape in shapes)
    assert device.products == "fixed tiles" and Cuda(0, "fast").products == "cuBLAS"
