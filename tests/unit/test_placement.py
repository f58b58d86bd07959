"""Placement: hand-worked tables, the rules of the table, properties of every strategy, the placement file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moempi.errors import DataError, FitError, JobError
from moempi.files.placement import fits, read_placement, write_placement
from moempi.job import PlacementOptions
from moempi.model.config import ModelConfig
from moempi.planning.packing import balanced_layer, extra_copies, held_load, linear_layer
from moempi.planning.placement import (
    Placement,
    check_placement,
    check_strict,
    cut_expert,
    max_over_mean,
    place,
    rank_load,
    replica_counts,
)


def model(n_experts: int, n_layers: int = 2, dense_layers: tuple[int, ...] = (0,)) -> ModelConfig:
    return ModelConfig(
        n_layers=n_layers, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, vocab=10, dense_hidden=16, expert_hidden=8,
        n_experts=n_experts, top_k=1, dense_layers=dense_layers, normalize_gate=True, rope_theta=1e4, norm_eps=1e-6,
        tied_embeddings=True, max_positions=64, eos_tokens=(),
    )  # fmt: skip


def placed(n_experts: int, n_ranks: int, load=None, slot_limit=None, n_layers=2, leaves=1, **options) -> Placement:
    """A checked placement of `n_layers - 1` MoE layers (layer 0 is dense); `load` is for one layer, or for each."""
    config = model(n_experts, n_layers)
    loads = None if load is None else np.broadcast_to(np.asarray(load), (n_layers - 1, n_experts))
    placement = place(config, n_ranks, PlacementOptions(**options), leaves, loads, slot_limit)
    check_placement(placement)
    return placement


def by_rank(placement: Placement, layer: int = 1) -> list[list[int]]:
    """The experts of every rank in one layer."""
    here = placement.layer == layer
    return [placement.expert[here & (placement.rank == rank)].tolist() for rank in range(placement.n_ranks)]


# ---------------------------------------------------------------- hand-worked tables


def test_a_table_written_out() -> None:
    # E = 2 on N = 3, two MoE layers: the spare rank holds a copy of the busier expert of the layer.
    config = model(2, n_layers=3)
    placement = place(config, 3, PlacementOptions(), 4, np.array([[5, 9], [7, 3]]))
    table = np.stack(list(placement.slots().values()), axis=1).tolist()
    assert table == [
        # layer, expert, replica, lo, hi, rank
        [1, 0, 0, 0, 4, 0],
        [1, 1, 0, 0, 4, 1],
        [1, 1, 1, 0, 4, 2],
        [2, 0, 0, 0, 4, 0],
        [2, 1, 0, 0, 4, 1],
        [2, 0, 1, 0, 4, 2],
    ]
    assert placement.shape() == (3, 2, 4, (1, 2))
    assert {column.dtype for column in placement.slots().values()} == {np.dtype(np.int32)}
    check_placement(placement)


@pytest.mark.parametrize(
    ("n_experts", "n_ranks", "options", "expected"),
    [
        (4, 4, {}, [[0], [1], [2], [3]]),
        (1, 1, {}, [[0]]),
        (5, 1, {}, [[0, 1, 2, 3, 4]]),
        (6, 3, {}, [[0, 1], [2, 3], [4, 5]]),
        # Counts that don't divide: blocks of 3 and 2, the free place is filled by a copy unless told otherwise.
        (5, 2, {"replicas": 0}, [[0, 1, 2], [3, 4]]),
        (5, 2, {}, [[0, 1, 2], [0, 3, 4]]),
        (7, 3, {"replicas": 0}, [[0, 1, 2], [3, 4], [5, 6]]),
        # Spare ranks: copies go round over the experts.
        (3, 8, {}, [[0], [1], [2], [0], [1], [2], [0], [1]]),
        (3, 8, {"replicas": 2}, [[0], [1], [2], [0], [1], [], [], []]),
        (1, 4, {}, [[0], [0], [0], [0]]),
        # Every expert on every rank.
        (2, 3, {"replicas": 4}, [[0, 1], [0, 1], [0, 1]]),
        # The copy of 0 finds only rank 0 with a free place, so an expert moves there and makes room.
        (3, 2, {"replicas": 1}, [[0, 1], [0, 2]]),
    ],
)
def test_linear(n_experts: int, n_ranks: int, options: dict, expected: list) -> None:
    assert by_rank(placed(n_experts, n_ranks, strategy="linear", **options)) == expected


def test_linear_makes_room_where_only_holders_are_free() -> None:
    # Rank 1 alone has a place, and holds the busiest expert already: its copy goes to rank 0, whose 0 moves.
    assert by_rank(placed(3, 2, load=[1, 1, 9])) == [[1, 2], [0, 2]]


def test_linear_copies_the_busiest_on_spare_ranks() -> None:
    # 12, 2, 1 over 6 ranks: expert 0 gets copies while 12 / copies >= 2: 12, 6, 4.
    assert by_rank(placed(3, 6, load=[12, 2, 1])) == [[0], [1], [2], [0], [0], [0]]


@pytest.mark.parametrize(
    ("load", "extra", "n_ranks", "expected"),
    [
        ([9, 4, 1], 4, 8, [0, 0, 1, 0]),  # loads per copy: 9, then 4.5, then 4, then 3
        ([0, 0, 0], 4, 8, [0, 1, 2, 0]),
        ([5, 0, 0], 4, 3, [0, 0, 1, 2]),  # three copies are one per rank
        ([1], 0, 1, []),
    ],
)
def test_extra_copies(load: list, extra: int, n_ranks: int, expected: list) -> None:
    assert extra_copies(np.array(load, dtype=float), extra, n_ranks).tolist() == expected


def test_balanced_longest_first() -> None:
    # 8 | 7 | 6, then 5 to the rank of 6, 4 to that of 7, 3 to that of 8: all 11.
    placement = placed(6, 3, load=[3, 4, 5, 6, 7, 8], strategy="balanced")
    assert rank_load(placement, [[3, 4, 5, 6, 7, 8]]).tolist() == [[11, 11, 11]]
    assert by_rank(placement) == [[0, 5], [1, 4], [2, 3]]


def test_balanced_keeps_the_odd_slots_off_the_heavy_rank() -> None:
    placement = placed(5, 2, load=[10, 1, 1, 1, 1], strategy="balanced", replicas=0)
    assert sorted(map(len, by_rank(placement))) == [2, 3]
    assert sorted(rank_load(placement, [[10, 1, 1, 1, 1]])[0]) == [3, 11]


def test_balanced_swaps_where_longest_first_errs() -> None:
    # Longest first ends at 7 and 5; swapping a 3 against a 2 makes it even.
    placement = placed(5, 2, load=[3, 3, 2, 2, 2], strategy="balanced", replicas=0)
    assert rank_load(placement, [[3, 3, 2, 2, 2]]).tolist() == [[6, 6]]


def test_balanced_takes_linear_blocks_where_they_are_better() -> None:
    # Longest first ends at 9 + 7 + 6 = 22 against 20, and no swap of two helps; in blocks it is 21 and 21.
    load = [7, 7, 1, 6, 9, 3, 9]
    placement = placed(7, 2, load=load, strategy="balanced", replicas=0)
    assert sorted(rank_load(placement, [load])[0]) == [21, 21]


def test_balanced_spreads_load_over_the_layers() -> None:
    # One slot per rank and layer: the busy expert of the second layer goes where the first layer's is not.
    load = np.array([[9, 1], [9, 1]])
    placement = place(model(2, 3), 2, PlacementOptions(strategy="balanced"), 1, load)
    assert rank_load(placement, load).sum(axis=0).tolist() == [10, 10]


def test_random_depends_on_seed_and_layer_only() -> None:
    first = placed(16, 16, strategy="random", seed=3, n_layers=3)
    assert first == placed(16, 16, strategy="random", seed=3, n_layers=3)
    assert first != placed(16, 16, strategy="random", seed=4, n_layers=3)
    assert by_rank(first, 1) != by_rank(first, 2)
    assert sorted(first.expert[first.layer == 1]) == list(range(16))


def test_no_moe_layers() -> None:
    placement = place(model(4, 1, (0,)), 3, PlacementOptions(strategy="balanced"), 1, slot_limit=0)
    check_placement(placement)
    check_strict(placement, PlacementOptions(strict=True))
    assert len(placement.rank) == 0
    assert rank_load(placement, np.zeros((0, 4))).shape == (0, 3)


# ---------------------------------------------------------------- properties


@st.composite
def cases(draw: st.DrawFn) -> dict:
    n_experts, n_ranks = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    zeros_and_skew = st.one_of(st.just(0), st.integers(0, 10), st.integers(0, 10**6), st.just(10**12))
    row = st.lists(zeros_and_skew, min_size=n_experts, max_size=n_experts)
    return {
        "n_experts": n_experts,
        "n_ranks": n_ranks,
        "n_layers": draw(st.integers(2, 4)),
        "load": draw(st.none() | row),
        "replicas": draw(st.just("auto") | st.integers(0, min(60, n_experts * (n_ranks - 1)))),
    }


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["linear", "balanced", "random"]))
@example({"n_experts": 3, "n_ranks": 3, "n_layers": 3, "load": [0, 0, 0], "replicas": 6}, "random")
@example({"n_experts": 2, "n_ranks": 20, "n_layers": 4, "load": [0, 10**12], "replicas": 37}, "balanced")
def test_rules_hold_for_every_strategy(case: dict, strategy: str) -> None:
    placement = placed(**case, strategy=strategy)  # checks: all covered, none twice on a rank, numbered replicas
    assert placement == placed(**case, strategy=strategy)
    extra = -case["n_experts"] % case["n_ranks"] if case["replicas"] == "auto" else case["replicas"]
    for layer in placement.layers:
        counts = [len(experts) for experts in by_rank(placement, layer)]
        assert sum(counts) == case["n_experts"] + extra
        assert max(counts) - min(counts) <= 1
    if strategy != "linear":
        totals = np.bincount(placement.rank, minlength=case["n_ranks"])
        assert totals.max() - totals.min() <= 1


@settings(max_examples=150, deadline=None)
@given(cases())
def test_balanced_is_never_worse_than_linear(case: dict) -> None:
    load = np.ones(case["n_experts"]) if case["load"] is None else np.array(case["load"], dtype=float)
    extra = -case["n_experts"] % case["n_ranks"] if case["replicas"] == "auto" else case["replicas"]
    copies = extra_copies(load, extra, case["n_ranks"])
    weight = load / (1 + np.bincount(copies, minlength=len(load)))
    packed, blocks = balanced_layer(case["n_ranks"], copies, weight), linear_layer(len(load), case["n_ranks"], copies)
    assert packed.sum(axis=0).tolist() == blocks.sum(axis=0).tolist()
    assert held_load(packed, weight).max() <= held_load(blocks, weight).max()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_copies_follow_the_load(case: dict) -> None:
    load = np.ones(case["n_experts"]) if case["load"] is None else np.array(case["load"], dtype=float)
    extra = -case["n_experts"] % case["n_ranks"] if case["replicas"] == "auto" else case["replicas"]
    copies = 1 + np.bincount(extra_copies(load, extra, case["n_ranks"]), minlength=len(load))
    assert copies.max() <= case["n_ranks"]
    # No expert that could have had one more copy is busier, per copy, than another was before its last copy.
    open_ones, copied = copies < case["n_ranks"], copies > 1
    if open_ones.any() and copied.any():
        assert (load / copies)[open_ones].max() <= (load[copied] / (copies[copied] - 1)).min()


def test_a_large_case_in_bounded_time() -> None:
    load = np.random.Generator(np.random.Philox(1)).pareto(1.0, size=(1, 256))
    placement = placed(256, 320, load=load[0], strategy="balanced")
    assert replica_counts(placement).sum() == 320
    share = load[0] / replica_counts(placement)[0]
    assert rank_load(placement, load).max() == pytest.approx(share.max())  # one slot per rank: nothing to pack
    assert max_over_mean(rank_load(placed(256, 32, load=load[0], strategy="balanced", replicas=64), load))[0] < 1.2


# ---------------------------------------------------------------- what does not fit


def test_strict_names_layer_slots_and_ranks() -> None:
    message = (
        "layer 1: E = 16 experts on N = 4 ranks need 4 slots per rank and layer (rank 0); "
        "placement.strict allows 1; use 16 ranks or placement.strict = false"
    )
    with pytest.raises(FitError, match=re.escape(message)):
        placed(16, 4, strict=True)
    with pytest.raises(FitError, match=r"4 experts and 3 extra slots on N = 6 ranks need 2 .* use 7 ranks"):
        placed(4, 6, strict=True, replicas=3)
    assert by_rank(placed(3, 4, strict=True)) == [[0], [1], [2], [0]]


def test_strict_holds_for_a_placement_from_a_file() -> None:
    with pytest.raises(FitError, match="another placement file"):
        check_strict(placed(4, 2), PlacementOptions(strategy="file", file=Path("p.h5"), strict=True))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"n_experts": 3, "n_ranks": 2, "replicas": 4}, "at most 3 extra slots per layer"),
        ({"n_experts": 3, "n_ranks": 1, "replicas": 1}, "at most 0 extra slots per layer"),
        ({"n_experts": 8, "n_ranks": 2, "slot_limit": 3}, "need 4 slots .* room for 3; use at least 3 ranks, or raise"),
        ({"n_experts": 8, "n_ranks": 2, "slot_limit": 0}, "room for 0; raise memory.limit$"),
        ({"n_experts": 8, "n_ranks": 8, "slot_limit": 1, "replicas": 1}, "ask for fewer placement.replicas, or raise"),
        # Two layers of 3 on 2 ranks: linear puts 2 + 2 on rank 0, spread evenly it is 3 each.
        ({"n_experts": 3, "n_ranks": 2, "n_layers": 3, "slot_limit": 3}, "need 4 .*strategy = 'balanced', which"),
    ],
)
def test_refused_with_numbers(case: dict, message: str) -> None:
    with pytest.raises(FitError, match=message):
        placed(**case)


def test_auto_replicas_follow_the_memory() -> None:
    # 3 experts, 2 ranks, 2 layers: even slots need 3 per rank; 4 leave room for a copy in each layer.
    assert len(placed(3, 2, n_layers=3, strategy="balanced", slot_limit=3).rank) == 6
    assert len(placed(3, 2, n_layers=3, strategy="balanced", slot_limit=4).rank) == 8
    assert len(placed(3, 2, n_layers=3, strategy="balanced", slot_limit=99).rank) == 8
    # 2 experts on 5 ranks, 2 layers, 1 slot of memory each: 2 slots of each layer only.
    few = placed(2, 5, n_layers=3, strategy="balanced", slot_limit=1)
    assert np.bincount(few.rank, minlength=5).tolist() == [1, 1, 1, 1, 0]


def test_auto_replicas_even_out_a_measured_load_where_memory_allows() -> None:
    load = [50.0] + [1.0] * 15  # mean per rank: 16.25
    case = {"n_experts": 16, "n_ranks": 4, "strategy": "balanced", "load": load}

    def fullest(**more) -> float:
        return float(max_over_mean(rank_load(placed(**case, **more), np.array([load])))[0])

    assert fullest() == fullest(slot_limit=4) == fullest(slot_limit=99, replicas=0) == 53 / 16.25
    assert fullest(slot_limit=5) < 1.1  # the busy expert is on every rank
    # A sixth slot would gain less than it costs; and nothing is added where nothing is known of the load.
    assert len(placed(**case, slot_limit=99).rank) == 20
    assert len(placed(**{**case, "load": None}, slot_limit=99).rank) == 16


@pytest.mark.parametrize(
    "bad", [np.ones((1, 3)), np.ones(4), [[1, 1, 1, -1]], [[1, 1, 1, np.nan]], [[1, 1, 1, np.inf]], [["1"] * 4]]
)
def test_a_bad_load_is_refused(bad) -> None:
    with pytest.raises(DataError, match="load"):
        place(model(4), 4, PlacementOptions(strategy="balanced"), 1, np.asarray(bad))


# ---------------------------------------------------------------- the rules of the table


def table(rows: list, n_ranks: int = 3, n_experts: int = 1, leaves: int = 4, layers=(1,)) -> Placement:
    columns = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    names = ("layer", "expert", "replica", "lo", "hi", "rank")
    return Placement.from_slots(n_ranks, n_experts, leaves, layers, dict(zip(names, columns, strict=True)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 0, 0, 0, 2, 0]], "layer 1, expert 0: hole: replica 0 ends at leaf 2 of 4"),
        ([[1, 0, 0, 2, 4, 0]], "layer 1, expert 0: hole: replica 0 holds nothing just before leaf 2"),
        ([[1, 0, 0, 0, 1, 0], [1, 0, 0, 2, 4, 1]], "hole: replica 0 holds nothing just before leaf 2"),
        ([[1, 0, 0, 0, 2, 0], [1, 0, 0, 0, 4, 1]], "overlap: replica 0 holds leaf 0 twice"),
        ([[1, 0, 0, 0, 4, 0], [1, 0, 0, 2, 4, 1]], "overlap: replica 0 holds leaf 2 twice"),
        ([[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 4, 1]], "range 1:4 is unaligned"),
        ([[1, 0, 0, 0, 3, 0], [1, 0, 0, 3, 4, 1]], "range 0:3 is unaligned"),
        ([[1, 0, 0, 0, 1, 0], [1, 0, 0, 1, 3, 1], [1, 0, 0, 3, 4, 2]], "range 1:3 is unaligned"),
        ([[1, 0, 0, 0, 8, 0]], "range 0:8 is not a part of 0:4"),
        ([[1, 0, 0, 2, 2, 0]], "range 2:2 is not a part of 0:4"),
        ([[1, 0, 0, -4, 0, 0]], "range -4:0 is not a part"),
        ([[1, 0, 0, 0, 4, 1], [1, 0, 1, 0, 4, 1]], "layer 1, expert 0: twice on rank 1"),
        ([[1, 0, 0, 0, 2, 1], [1, 0, 0, 2, 4, 1]], "twice on rank 1"),
        ([[1, 0, 0, 0, 4, 3]], "rank 3 is out of range; there are 3 ranks"),
        ([[1, 0, 0, 0, 4, -1]], "rank -1 is out of range"),
        ([[1, 0, 0, 0, 4, 0], [1, 1, 0, 0, 4, 0]], "layer 1, expert 1: there are only 1 experts"),
        ([[2, 0, 0, 0, 4, 0]], "layer 2, expert 0: the table names no such MoE layer"),
        ([[1, 0, 1, 0, 4, 0]], "replicas must be numbered"),
        ([[1, 0, 0, 0, 4, 0], [1, 0, 2, 0, 4, 1]], "replica 2: replicas must be numbered"),
        ([], "layer 1, expert 0: missing"),
    ],
)
def test_what_the_table_must_not_hold(rows: list, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        check_placement(table(rows))


def test_missing_experts_are_named() -> None:
    whole = [[layer, expert, 0, 0, 4, 0] for layer in (1, 3) for expert in range(3)]
    check_placement(table(whole, n_experts=3, layers=(1, 3)))
    for gone in range(6):
        layer, expert = whole[gone][:2]
        with pytest.raises(DataError, match=f"layer {layer}, expert {expert}: missing"):
            check_placement(table(whole[:gone] + whole[gone + 1 :], n_experts=3, layers=(1, 3)))


def test_counts_and_order_are_checked() -> None:
    good = table([[1, 0, 0, 0, 4, 0], [1, 0, 1, 0, 4, 1]])
    check_placement(good)
    for change, message in [
        ({"leaves": 3}, "power of two"),
        ({"n_ranks": 0}, "n_ranks = 0"),
        ({"layers": (1, 1)}, "must rise"),
        ({"rank": np.zeros(1, dtype=np.int32)}, "one length"),
        ({"rank": good.rank[::-1], "replica": good.replica[::-1]}, "sorted"),
    ]:
        with pytest.raises(DataError, match=message):
            check_placement(replace(good, **change))


def test_a_huge_number_of_experts_costs_nothing() -> None:
    with pytest.raises(DataError, match="layer 1, expert 1: missing"):
        check_placement(table([[1, 0, 0, 0, 4, 0]], n_experts=2**31 - 1))


# ---------------------------------------------------------------- cutting and measuring


def test_cut_expert() -> None:
    placement = cut_expert(placed(2, 4, leaves=4, replicas=0), 1, 1, [3, 0])
    rows = np.stack(list(placement.slots().values()), axis=1).tolist()
    assert rows == [[1, 0, 0, 0, 4, 0], [1, 1, 0, 2, 4, 0], [1, 1, 0, 0, 2, 3]]
    # All rows go to each piece.
    assert rank_load(placement, [[10, 6]]).tolist() == [[16, 0, 0, 6]]
    assert replica_counts(placement).tolist() == [[1, 1]]


def test_cut_one_of_two_replicas() -> None:
    placement = cut_expert(placed(1, 2, leaves=2), 1, 0, [1], replica=1)
    assert placement == placed(1, 2, leaves=2)
    wide = replace(placement, n_ranks=4)
    cut = cut_expert(wide, 1, 0, [2, 3], replica=1)
    assert replica_counts(cut).tolist() == [[2]]
    assert rank_load(cut, [[8]]).tolist() == [[4, 0, 4, 4]]


@pytest.mark.parametrize(
    ("error", "expert", "pieces", "message"),
    [
        (JobError, 0, [0, 1, 2], "cut into 3 pieces"),
        (JobError, 0, [], "cut into 0 pieces"),
        (JobError, 0, [0, 1, 2, 3, 4, 5, 6, 7], "at most model.leaves = 4"),
        (JobError, 5, [0, 1], "no whole slot"),
        (DataError, 0, [0, 9], "rank 9 is out of range"),
        (DataError, 0, [1, 1], "twice on rank 1"),
    ],
)
def test_cuts_that_are_refused(error: type, expert: int, pieces: list, message: str) -> None:
    with pytest.raises(error, match=message):
        cut_expert(placed(2, 4, leaves=4), 1, expert, pieces)


def test_an_expert_is_cut_once() -> None:
    cut = cut_expert(placed(1, 2, leaves=2, replicas=0), 1, 0, [0, 1])
    with pytest.raises(JobError, match="no whole slot"):
        cut_expert(cut, 1, 0, [0, 1])


def test_max_over_mean() -> None:
    assert max_over_mean(np.array([[4.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]])).tolist() == [4, 1, 1]


# ---------------------------------------------------------------- the file


def test_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "placement.h5"
    placement = cut_expert(placed(5, 3, n_layers=4, leaves=4, strategy="random", replicas=0), 2, 3, [2, 0, 1, 2][:2])
    write_placement(path, placement, {"load": "ab" * 32})
    assert read_placement(path) == placement
    with h5py.File(path) as file:
        assert file["slots/rank"].dtype == np.int32
        assert file["slots/lo"].attrs["units"] == b"leaves"
        assert (file.attrs["n_ranks"], file.attrs["n_experts"], file.attrs["leaves"]) == (3, 5, 4)


def test_file_of_a_model_without_experts(tmp_path: Path) -> None:
    path = tmp_path / "placement.h5"
    placement = place(model(4, 1, (0,)), 3, PlacementOptions(), 1)
    write_placement(path, placement)
    assert read_placement(path) == placement


def test_rows_of_a_file_may_stand_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "placement.h5"
    placement = placed(4, 3)
    write_placement(path, placement)
    with h5py.File(path, "r+") as file:
        for name, column in placement.slots().items():
            file["slots"][name][...] = column[::-1]
    assert read_placement(path) == placement


def _delete_column(file: h5py.File) -> None:
    del file["slots/hi"]


def _shorten_column(file: h5py.File) -> None:
    del file["slots/hi"]
    file["slots/hi"] = np.zeros(2, dtype=np.int32)


def _float_column(file: h5py.File) -> None:
    del file["slots/hi"]
    file["slots/hi"] = np.zeros(4)


def _endless_column(file: h5py.File) -> None:
    del file["slots/hi"]
    file.create_dataset("slots/hi", shape=(10**12,), chunks=(1000,), dtype=np.int32)


def _wide_column(file: h5py.File) -> None:
    del file["slots/rank"]
    file["slots/rank"] = np.array([0, 1, 2, 2**32])


def _no_count(file: h5py.File) -> None:
    del file.attrs["n_ranks"]


def _text_count(file: h5py.File) -> None:
    file.attrs["leaves"] = np.bytes_(b"four")


def _rank_out_of_range(file: h5py.File) -> None:
    file["slots/rank"][3] = 77


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_delete_column, "there is no dataset /slots/hi"),
        (_shorten_column, "expected one length"),
        (_float_column, "/slots/hi is float64"),
        (_endless_column, "/slots/hi claims 4000000000000 bytes, but stores 0"),
        (_wide_column, "32-bit"),
        (_no_count, "attribute n_ranks is None"),
        (_text_count, "attribute leaves"),
        (_rank_out_of_range, "layer 1, expert 3: rank 77 is out of range"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "placement.h5"
    write_placement(path, placed(4, 4))
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(DataError, match=message) as caught:
        read_placement(path)
    assert str(path) in str(caught.value)


def test_flipped_bytes_never_give_a_broken_table(tmp_path: Path) -> None:
    path = tmp_path / "placement.h5"
    write_placement(path, placed(5, 3, n_layers=3))
    whole = path.read_bytes()
    random = np.random.Generator(np.random.Philox(7))
    refused = 0
    for case in range(150):
        raw = bytearray(whole[: random.integers(len(whole))] if case % 3 == 0 else whole)
        for place_of_flip in random.integers(len(raw), size=0 if case % 3 == 0 or not raw else 20):
            raw[place_of_flip] = random.integers(256)
        path.write_bytes(raw)
        try:
            check_placement(read_placement(path))
        except DataError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 50


def test_a_broken_placement_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        write_placement(tmp_path / "placement.h5", table([]))
    assert list(tmp_path.iterdir()) == []


def test_fits() -> None:
    path = Path("p.h5")
    placement = placed(4, 2, leaves=2)
    fits(placement, model(4), 2, 2, path)
    with pytest.raises(JobError, match="made for 2 ranks, but the job runs on 3"):
        fits(placement, model(4), 3, 2, path)
    with pytest.raises(JobError, match=r"2 leaves, but model\.leaves = 1"):
        fits(placement, model(4), 2, 1, path)
    with pytest.raises(DataError, match="made for 4 experts per layer; the model has 5"):
        fits(placement, model(5), 2, 2, path)
    with pytest.raises(DataError, match=re.escape("places 1 layers (1); the model has experts in 2 layers (1, 2)")):
        fits(placement, model(4, 3), 2, 2, path)


@pytest.mark.parametrize("strategy", ["linear", "random"])
def test_the_ranks_that_an_error_asks_for_are_enough(strategy: str) -> None:
    # 7 experts in 3 layers, memory for 8 slots.
    case = {"n_experts": 7, "n_layers": 4, "slot_limit": 8, "strategy": strategy}
    with pytest.raises(FitError) as caught:
        placed(n_ranks=2, **case)
    enough = int(re.search(r"use at least (\d+) ranks", str(caught.value)).group(1))
    assert enough == {"linear": 4, "random": 3}[strategy]
    assert np.bincount(placed(n_ranks=enough, **case).rank).max() <= 8
    with pytest.raises(FitError):
        placed(n_ranks=enough - 1, **case)
