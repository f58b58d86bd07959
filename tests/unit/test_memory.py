"""The memory plan: hand-worked sums for small shapes, cuts, limits, and a known model's parameters."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moempi.device.arena import Arena, aligned
from moempi.errors import FitError
from moempi.exchange.nodes import pretended
from moempi.exchange.relay_plan import Ways
from moempi.job import PlacementOptions, job_from_table
from moempi.layout import Layout, lay_out, most_that_fits
from moempi.model.config import ModelConfig
from moempi.planning import gpu_memory, memory
from moempi.planning.placement import cut_expert, place

# Layer 0 is dense, layers 1 and 2 have experts.
SMALL = ModelConfig(
    n_layers=3, d_model=8, n_heads=4, n_kv_heads=2, head_dim=6, vocab=50, dense_hidden=20, expert_hidden=12,
    n_experts=5, top_k=2, dense_layers=(0,), normalize_gate=True, rope_theta=1e4, norm_eps=1e-6,
    tied_embeddings=False, max_positions=64, eos_tokens=(),
)  # fmt: skip
TIED = replace(SMALL, tied_embeddings=True)
LARGE = replace(SMALL, d_model=1024, expert_hidden=65)  # gate and up together beyond 2^17 weights
STEP = {"capacity": 3, "kv_tokens": 65, "max_step_tokens": 10, "microbatches": 2, "arrival_budget": 5000}

# By hand, in bfloat16 (2 bytes):
#   embedding and head 2 x 50 x 8 = 800; q and o 2 x 8 x 24 = 384, k and v 2 x 8 x 12 = 192, in 3 layers 1728;
#   dense 3 x 8 x 20 = 480; together 3008 x 2 bytes = 6016.
#   norms 3 x (2 x 8 + 2 x 6) + 8 = 92, gates 2 x 5 x 8 = 80; 172 x 4 bytes = 688.
SHARED = 6704
SLOT = 3 * 8 * 12 * 2
# 65 positions are two pages of 64; a head of 6 is stored as 16. Keys and values
# 2 x 3 layers x 2 heads x 16 x 2 bytes x 128.
KV = 49152
# A microbatch sends 10 x 2 rows of 8 and gets as many back: 2 x 20 x 8 x 2 bytes.
ROWS = 640


def test_the_parts_by_hand() -> None:
    assert memory.shared_bytes(SMALL, 2) == SHARED
    assert memory.slot_bytes(SMALL, 2) == SLOT == 576
    assert memory.kv_bytes(SMALL, 2, 65) == KV
    assert memory.kv_bytes(SMALL, 2, 64) == KV // 2
    assert memory.home_message_bytes(SMALL, 2, 10) == ROWS


def test_a_tied_head_counts_once_and_its_packed_copy_when_asked() -> None:
    assert memory.shared_bytes(TIED, 2) == SHARED - 50 * 8 * 2
    assert memory.shared_bytes(TIED, 2, packed_head=True) == SHARED
    assert memory.shared_bytes(SMALL, 2, packed_head=True) == SHARED
    assert memory.shared_bytes(SMALL, 2, gpu=True) == SHARED - 80 * 2


def test_plan_of_every_rank() -> None:
    # 5 experts on 2 ranks in 2 layers, no copies: 3 + 3 and 2 + 2 slots.
    placement = place(SMALL, 2, PlacementOptions(replicas=0), 1)
    plans = memory.plan_memory(SMALL, 2, placement, **STEP)
    assert [(plan.rank, plan.slots, plan.expert_bytes) for plan in plans] == [(0, 6, 6 * SLOT), (1, 4, 4 * SLOT)]
    for plan in plans:
        assert (plan.shared_bytes, plan.kv_bytes) == (SHARED, KV)
        assert plan.message_bytes == 5000 + 2 * ROWS
        assert plan.total == SHARED + KV + plan.expert_bytes + plan.message_bytes + plan.step_bytes


def test_relays_hold_a_budget_for_every_kind_of_hop() -> None:
    placement = place(SMALL, 4, PlacementOptions(replicas=0), 1)
    nodes = pretended([3, 1], 4)
    leaders, rails = (memory.relay_bytes(Ways(route, nodes), 1000) for route in ("leader", "rail"))
    assert leaders == {0: 4000, 3: 4000} and rails == dict.fromkeys(range(4), 3000)
    plans = memory.plan_memory(SMALL, 2, placement, relays=leaders, **STEP)
    # Homes pack rows for relays, and get what they bring, beside their own.
    assert [plan.message_bytes for plan in plans] == [5000 + 4 * ROWS + relay for relay in (4000, 0, 0, 4000)]
    # 10 tokens x 2 experts x 8 numbers: rows in 2 bytes, answers and two returns in 4; and the lists of a parcel.
    assert memory.relay_budget(0, SMALL, 2, 10) == 160 * 14 + 256 + 4 * (2 * 5 + 2 * 20)
    assert memory.relay_budget(10**6, SMALL, 2, 10) == 10**6


def test_ranks_that_are_no_homes_hold_no_cache_and_send_nothing() -> None:
    placement = place(SMALL, 3, PlacementOptions(), 1)
    plans = memory.plan_memory(SMALL, 2, placement, homes=(0,), **STEP)
    assert [plan.kv_bytes for plan in plans] == [KV, 0, 0]
    assert [plan.message_bytes for plan in plans] == [5000 + 2 * ROWS, 5000, 5000]


def test_a_rank_without_slots_is_planned() -> None:
    placement = place(SMALL, 7, PlacementOptions(replicas=0), 1)
    assert [plan.slots for plan in memory.plan_memory(SMALL, 2, placement, **STEP)] == [2, 2, 2, 2, 2, 0, 0]


def test_a_cut_expert_holds_its_range_and_answers_in_float32() -> None:
    # Hidden size 12 in 4 leaves of 3: halves of expert 4 in layer 2 move to ranks 0 and 3.
    placement = cut_expert(place(SMALL, 5, PlacementOptions(), 4), 2, 4, [0, 3])
    plans = memory.plan_memory(SMALL, 2, placement, **STEP)
    half = 3 * 8 * 6 * 2
    assert [plan.expert_bytes for plan in plans] == [2 * SLOT + half, 2 * SLOT, 2 * SLOT, 2 * SLOT + half, SLOT]
    # A token goes to at most one cut and one whole expert: 3 rows of 8 out in 2 bytes and back in 4.
    assert plans[0].message_bytes == 5000 + 2 * (10 * 3 * 8 * (2 + 4))


def test_leaves_that_do_not_divide_the_hidden_size_still_add_up() -> None:
    placement = place(SMALL, 5, PlacementOptions(), 8)
    for ranks in ([0], [0, 1], [0, 1, 2, 3]):
        cut = cut_expert(placement, 1, 0, ranks)
        total = sum(plan.expert_bytes for plan in memory.plan_memory(SMALL, 2, cut, **STEP))
        assert total == 10 * SLOT


def test_shared_and_experts_are_the_parameters_of_the_demo_model() -> None:
    # 4.6 M parameters: 16 experts of 3 x 128 x 128 in 5 layers, and the rest counted tensor by tensor.
    tiny = ModelConfig(
        n_layers=6, d_model=128, n_heads=4, n_kv_heads=4, head_dim=32, vocab=1024, dense_hidden=384, expert_hidden=128,
        n_experts=16, top_k=2, dense_layers=(0,), normalize_gate=True, rope_theta=1e4, norm_eps=1e-6,
        tied_embeddings=True, max_positions=1024, eos_tokens=(0,),
    )  # fmt: skip
    shared = 1024 * 128 + 6 * (4 * 128 * 128 + 2 * 128 + 2 * 32) + 128 + 3 * 128 * 384 + 5 * 16 * 128
    assert memory.shared_bytes(tiny, 4) == 4 * shared
    assert memory.shared_bytes(tiny, 4) + 80 * memory.slot_bytes(tiny, 4) == 4 * 4616192


def test_a_home_with_a_gpu_has_a_page_for_padding() -> None:
    placement = place(SMALL, 2, PlacementOptions(replicas=0), 1)
    plans = memory.plan_memory(SMALL, 2, placement, **STEP, gpu=True, homes=[0])
    assert [plan.kv_bytes for plan in plans] == [KV + KV // 2, 0]


def test_a_home_with_a_gpu_keeps_room_for_the_messages_of_steady_steps() -> None:
    placement = place(SMALL, 2, PlacementOptions(replicas=0), 1)
    on_cpu, on_gpu = (memory.plan_memory(SMALL, 2, placement, **STEP, gpu=gpu, homes=[0]) for gpu in (False, True))
    more = STEP["microbatches"] * gpu_memory.steady_message_bytes(SMALL, 2, STEP["capacity"], n_ranks=2)
    frames = gpu_memory.frame_bytes(SMALL, 2, STEP["capacity"], n_ranks=2)
    assert [b.message_bytes - a.message_bytes for a, b in zip(on_cpu, on_gpu, strict=True)] == [more + frames, frames]


def test_a_model_without_experts() -> None:
    dense = replace(SMALL, dense_layers=(0, 1, 2))
    plans = memory.plan_memory(dense, 2, place(dense, 2, PlacementOptions(), 1), **STEP)
    assert [plan.expert_bytes for plan in plans] == [0, 0]


def test_large_sizes_do_not_overflow() -> None:
    big = replace(SMALL, n_layers=61, dense_layers=(0, 1, 2), d_model=7168, expert_hidden=2048, n_experts=256, top_k=8)
    (plan,) = memory.plan_memory(big, 2, place(big, 1, PlacementOptions(), 1), **STEP)
    assert plan.expert_bytes == 58 * 256 * 3 * 7168 * 2048 * 2


# ---------------------------------------------------------------- messages


def test_the_budget_holds_one_largest_message_and_its_answer() -> None:
    header = memory.header_bytes(SMALL)
    assert memory.largest_message(SMALL, 2, 10) == header + 20 * 8 * 2
    least = header + 20 * 8 * 2 + 20 * 8 * 4
    assert memory.arrival_budget(0, SMALL, 2, 10) == least
    assert memory.arrival_budget(least + 1, SMALL, 2, 10) == least + 1
    assert memory.arrival_budget(least - 1, SMALL, 2, 10) == least


@pytest.mark.parametrize(
    ("n_ranks", "capacity", "prefilling", "decoding", "on_gpu"),
    [
        (1, 1000, 1, 1, 1),  # alone: nothing is under way while it computes
        (4, 39, 2, 1, 1),  # 39 x 2 x 4 / 5 = 62.4 rows per expert call
        (4, 40, 2, 2, 1),  # 64 rows
        (4, 79, 2, 2, 1),  # 126.4 rows
        (4, 80, 2, 2, 2),  # 128 rows
    ],
)
def test_microbatches_auto(n_ranks: int, capacity: int, prefilling: int, decoding: int, on_gpu: int) -> None:
    assert memory.microbatches_auto(LARGE, n_ranks, capacity, gpu=False) == (prefilling, decoding)
    assert memory.microbatches_auto(SMALL, n_ranks, capacity, gpu=False) == (decoding, decoding)
    assert memory.microbatches_auto(SMALL, n_ranks, capacity, gpu=True) == (3, on_gpu)


@pytest.mark.parametrize(("gpu", "expected"), [(False, [1, 2, 2, 2]), (True, [1, 2, 3, 3])])
def test_no_more_microbatches_than_sequences(gpu: bool, expected: list[int]) -> None:
    assert [memory.microbatches_auto(LARGE, 2, n, gpu=gpu).n for n in (1, 2, 3, 4)] == expected


# ---------------------------------------------------------------- limits


def test_the_limit_names_the_fullest_rank_and_its_parts() -> None:
    plans = memory.plan_memory(SMALL, 2, place(SMALL, 2, PlacementOptions(replicas=0), 1), **STEP)
    memory.check_limit(plans, 0)
    memory.check_limit(plans, plans[0].total)
    message = (
        f"memory.limit = {memory.show_bytes(plans[1].total)}: rank 0 needs {memory.show_bytes(plans[0].total)} "
        "(shared weights 6.5 KiB, 6 slots 3.4 KiB, KV cache 48.0 KiB, messages 6.1 KiB, activations "
    )
    with pytest.raises(FitError, match=re.escape(message) + ".* 1 of 2 ranks"):
        memory.check_limit(plans, plans[1].total)
    with pytest.raises(FitError, match="2 of 2 ranks"):
        memory.check_limit(plans, plans[1].total - 1)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 40), st.sampled_from(["linear", "balanced", "random"]))
def test_what_slots_within_allows_fits_the_limit(n_experts: int, n_ranks: int, room: int, strategy: str) -> None:
    config = replace(SMALL, n_experts=n_experts, top_k=1)
    bare = memory.plan_memory(config, 2, place(config, 1, PlacementOptions(), 1), **STEP)[0]
    limit = bare.total - bare.expert_bytes + room * SLOT + SLOT - 1
    slots = memory.slots_within(limit, config, 2, **STEP)
    assert slots == room
    try:
        placement = place(config, n_ranks, PlacementOptions(strategy=strategy), 1, slot_limit=slots)
    except FitError:
        per_layer = -(-n_experts // n_ranks) if strategy == "linear" else n_experts / n_ranks
        assert 2 * per_layer > room
        return
    memory.check_limit(memory.plan_memory(config, 2, placement, **STEP), limit)


@pytest.mark.parametrize(("level", "parts"), [("off", 0), ("summary", 0), ("full", 3), ("routes", 3)])
def test_notes_of_the_trace_are_in_the_plan(level: str, parts: int) -> None:
    bare = memory.plan_memory(SMALL, 2, place(SMALL, 2, PlacementOptions(), 1), **STEP)
    notes = memory.trace_bytes(level)
    assert notes == parts * 64 * 2**20
    plans = memory.plan_memory(SMALL, 2, place(SMALL, 2, PlacementOptions(), 1), **STEP, trace_bytes=notes)
    assert [plan.total - before.total for plan, before in zip(plans, bare, strict=True)] == [notes, notes]
    if notes:
        with pytest.raises(FitError, match=r"trace 192\.0 MiB"):
            memory.slots_within(notes, SMALL, 2, **STEP, trace_bytes=notes)


def test_no_limit_and_no_room() -> None:
    assert memory.slots_within(0, SMALL, 2, **STEP) is None
    with pytest.raises(FitError, match="without any expert a home rank needs"):
        memory.slots_within(1000, SMALL, 2, **STEP)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (2**20, "1.0 MiB"),
        (80 * 10**9, "74.5 GiB"), (5 * 2**40, "5120.0 GiB"),
    ],
)  # fmt: skip
def test_bytes_are_shown_in_a_fitting_unit(count: int, shown: str) -> None:
    assert memory.show_bytes(count) == shown


def test_plans_are_plain_integers() -> None:
    (plan, *_) = memory.plan_memory(SMALL, 2, place(SMALL, 2, PlacementOptions(), 1), **STEP)
    assert not any(isinstance(value, np.generic) for value in vars(plan).values())


# ---------------------------------------------------------------- what the cache gets


def test_the_cache_gets_the_most_pages_that_fit() -> None:
    asked: list[int] = []

    def attempt(positions: int) -> int:
        asked.append(positions)
        if positions > 1000:
            raise FitError(f"{positions} are too many")
        return positions

    assert most_that_fits(64, 960, attempt) == 960 and asked == [960]
    assert most_that_fits(128, 64 * 100, attempt) == 960 and len(asked) < 12
    with pytest.raises(FitError, match="1088 are too many"):
        most_that_fits(1088, 1088, attempt)
    with pytest.raises(FitError, match="1024 are too many"):
        most_that_fits(1024, 2048, attempt)


def layout_within(
    limit: int,
    kv_tokens: int | str = "auto",
    device: str = "cpu",
    gpu_bytes: int = 0,
    sizes: Mapping[str, int] = {"capacity": 8, "prefill_tokens": 512},
) -> Layout:
    """SMALL on two ranks: 40 prompts that come to 70 positions, eight at a time."""
    table = {
        "run": dict(sizes),
        "model": {"weights": "w.h5"}, "input": {"file": "i.h5"}, "output": {"file": "o.h5"},
        "memory": {"limit": limit, "kv_tokens": kv_tokens}, "exchange": {"arrival_budget": 0},
    }  # fmt: skip
    job = job_from_table(table, Path("job.toml"))
    return lay_out(job, SMALL, "bfloat16", 2, [70] * 40, device=device, gpu_bytes=gpu_bytes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_limit_leaves_room_for_so_many_sequences(device: str) -> None:
    free = layout_within(0, device=device)
    assert free.kv_tokens == free.kv_wanted == 8 * 128
    four = layout_within(0, kv_tokens=4 * 128, device=device)
    limit = four.memory[0].total
    assert free.memory[0].total - limit == memory.kv_bytes(SMALL, 2, 4 * 128)
    held = layout_within(limit, device=device)
    assert (held.kv_tokens, held.kv_wanted, held.memory) == (4 * 128, 8 * 128, four.memory)
    # A page's bytes less, and the cache has a page less.
    assert layout_within(limit - 1, device=device).kv_tokens == 4 * 128 - 64
    with pytest.raises(FitError, match=r"need 6 slots on a rank; memory\.limit has room for 5"):
        layout_within(limit - memory.kv_bytes(SMALL, 2, 3 * 128) - 1, device=device)


def test_what_is_left_to_the_device() -> None:
    """Steps of 512 tokens; on GPUs as long ones as the KV cache leaves room for, up to 8192."""
    assert [layout_within(0, device=device, sizes={}).step_tokens for device in ("cpu", "cuda")] == [512, 8192]

    def within(limit: int) -> Layout:
        return layout_within(limit, device="cuda", sizes={"capacity": 8})

    sizes = [layout_within(0, device="cuda", sizes={"capacity": 8, "prefill_tokens": n}) for n in (8192, 4096, 512)]
    most, half, least = (one.memory[0].total for one in sizes)
    page = memory.kv_bytes(SMALL, 2, 64)
    assert within(most).step_tokens == 8192
    # A page less of sixteen is little enough; two are not, and steps of half as many tokens leave all.
    assert (within(most - page).step_tokens, within(most - page).kv_tokens) == (8192, 15 * 64)
    assert (within(most - 2 * page).step_tokens, within(most - 2 * page).kv_tokens) == (4096, 16 * 64)
    assert (within(half).step_tokens, within(least).step_tokens) == (4096, 512)
    # Where even the least leave no more, none are longer.
    assert (within(least - 8 * page).step_tokens, within(least - 8 * page).kv_tokens) == (512, 8 * 64)


def test_what_a_gpu_has_is_a_limit_where_the_job_has_none() -> None:
    four = layout_within(0, kv_tokens=4 * 128, device="cuda").memory[0].total
    assert layout_within(0, device="cuda", gpu_bytes=four).kv_tokens == 4 * 128
    assert layout_within(four + memory.kv_bytes(SMALL, 2, 128), device="cuda", gpu_bytes=four).kv_tokens == 5 * 128
    with pytest.raises(FitError, match=r"the memory of the GPU = 1\.0 KiB: .* CUDA's own 704\.0 MiB"):
        layout_within(0, device="cuda", gpu_bytes=1024)


def test_activations_on_a_gpu_by_hand() -> None:
    # 10 tokens, 2 microbatches, 3 sequences, one rank; dimension 8, 4 heads and 2 key-value heads of 6, bfloat16.
    steps = gpu_memory.step_bytes(
        SMALL, 2, n_ranks=1, capacity=3, max_step_tokens=10, microbatches=2, arrival_budget=10**9
    )
    resident = 2 * 10 * 3 * 8 * 2
    # Attention is widest: projections 24 + 12 + 12, queries 24 and mixed values 24.
    stage = 48 * 2 + 24 * 2 + 24 * 2 + 2 * 8 * 2
    # All 2 x 10 x 2 rows in one call, and 512 to round them up: three times 12 wide, and their places twice.
    call = (40 + 512) * (3 * 12 * 2 + 32)
    logits = 3 * 50 * (2 + 4)
    tables = 2 * 64 * 6 * 4
    # Steady steps: 16 rows of each microbatch, three of its own, a stage, and of every pair of the routes of 12 shapes
    # and 2 layers an expert, and once a place and a weight.
    steady = 2 * 16 * (3 * 8 * 2 + stage + (12 * 2 + 2) * 2 * 4)
    assert steps == resident + 10 * stage + steady + call + logits + tables + 48 * 2**20


def test_messages_of_steady_steps_on_a_gpu_by_hand() -> None:
    # 16 rows for 3 sequences, 2 pairs each, 8 wide in bfloat16, and as much for the answers. Before them a header for
    # each of 5 ranks: a line of 64 bytes and 4 for each of 5 experts, in rows of 16.
    header = 64 + 4 * SMALL.n_experts
    assert header == 84 and gpu_memory.header_rows(SMALL, 2) == 6
    assert gpu_memory.steady_message_bytes(SMALL, 2, capacity=3, n_ranks=5) == 2 * (16 * 2 + 5 * 6) * 8 * 2
    # A frame has these 32 rows behind a header, and room for their answers, in whole blocks of 512.
    assert gpu_memory.largest_frame(SMALL, 2, capacity=3, n_ranks=2) == 1024 + 512
    # One receive is posted for each other rank, up to four, and two frames of each may be here.
    assert [gpu_memory.frame_bytes(SMALL, 2, 3, n) for n in (1, 2, 5, 64)] == [0, 3 * 1536, 12 * 1536, 130 * 1536]
    # Of 1024 rows there is room for twice the average, and for some in any case.
    rows = 1024, 1024, 684, 256, 64
    expected = [aligned(header + 16 * n) + aligned(16 * n) for n in rows]
    assert [gpu_memory.largest_frame(SMALL, 2, 512, n) for n in (1, 2, 3, 8, 64)] == expected


@pytest.mark.parametrize("n_ranks", [2, 3, 4, 8, 64])
def test_frames_of_all_ranks_are_here_with_receives_for_the_next(n_ranks: int) -> None:
    """Two of each rank, taken and given back in any order, and all receives are posted."""
    largest = gpu_memory.largest_frame(SMALL, 2, 512, n_ranks)
    arena, rng = Arena(0, gpu_memory.frame_bytes(SMALL, 2, 512, n_ranks)), random.Random(n_ranks)
    rooms, held = gpu_memory.frames_posted(n_ranks) + 2 * (n_ranks - 1), list[int]()
    for _ in range(500):
        if held and rng.random() < 0.4:
            arena.give(held.pop(rng.randrange(len(held))))
        elif len(held) < rooms:
            block = arena.take(largest)
            assert block is not None
            held.append(block)


def test_steady_steps_have_whole_rounds_of_rows_and_so_many_at_most() -> None:
    assert [gpu_memory.steady_rows(n) for n in (1, 16, 17, 512, 513, 5000)] == [16, 16, 32, 512, 512, 512]


def test_what_ranks_took_of_their_gpus() -> None:
    alone = gpu_memory.Use("n0 0", used=900, reserved=300, peak=400)
    assert gpu_memory.peaks([alone]) == [1000]
    # Two that share one: 1000 used, 200 and 400 by their allocators, so 200 each are CUDA's own.
    first, second = gpu_memory.Use("n0 1", 1000, 200, 250), gpu_memory.Use("n0 1", 990, 400, 400)
    assert gpu_memory.peaks([alone, first, second]) == [1000, 450, 600]
    assert gpu_memory.peaks([]) == []


def test_what_a_rank_on_a_gpu_takes_of_its_host_by_hand() -> None:
    # The largest tensor is the embedding: 50 x 8, stored in four bytes and kept in two, or in four.
    assert gpu_memory.host_bytes(SMALL, 2, 1000, "on") == gpu_memory.HOST + 400 * 6
    assert gpu_memory.host_bytes(SMALL, 4, 1000, "off") == gpu_memory.HOST + 400 * 8 + 1000
    assert gpu_memory.host_bytes(SMALL, 4, 1000, "auto") == gpu_memory.HOST + 400 * 8 + 1000
