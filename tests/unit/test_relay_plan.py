"""Nodes, relays, parcels and their bytes, by hand-worked tables."""

from __future__ import annotations

import numpy as np
import pytest
from test_plan import placement_of, table_of

from moempi.errors import FitError
from moempi.exchange import relay_wire as wire
from moempi.exchange.nodes import Nodes, numbered, one_node, pretended
from moempi.exchange.plan import plan_dispatch
from moempi.exchange.predict import RowSizes
from moempi.exchange.predict_relays import relayed_from_routes, rows_between_nodes
from moempi.exchange.relay_plan import Parcel, Ways, pack_parcels, parcel_rows, split_by_node
from moempi.exchange.slots import layer_tables
from moempi.planning.placement import cut_expert
from moempi.stages import KINDS

# ---------------------------------------------------------------- nodes


def test_pretended_nodes() -> None:
    assert pretended(2, 6) == Nodes((0, 0, 1, 1, 2, 2))
    uneven = pretended([3, 1, 4], 8)
    assert uneven.ranks == ((0, 1, 2), (3,), (4, 5, 6, 7))
    assert [uneven.local(rank) for rank in range(8)] == [0, 1, 2, 0, 0, 1, 2, 3]
    assert [uneven.leader(node) for node in range(3)] == [0, 3, 4]
    assert uneven.describe() == "nodes of 3, 1 and 4 ranks" and pretended(1, 2).describe() == "2 nodes of 1 rank"
    assert one_node(3).n_nodes == 1 and one_node(3).describe() == "one node"


def test_nodes_as_mpi_finds_them_need_not_be_of_neighbours() -> None:
    nodes = numbered([0, 1, 0, 1, 0])
    assert nodes.ranks == ((0, 2, 4), (1, 3))
    assert nodes.local(4) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [(3, r"= 3 does not divide the 8 ranks"), ([3, 1], r"= \[3, 1\] adds up to 4 ranks, the job has 8")],
)
def test_nodes_that_do_not_add_up(given: int | list[int], said: str) -> None:
    with pytest.raises(FitError, match=said):
        pretended(given, 8)


# ---------------------------------------------------------------- who relays for whom


def test_leaders_relay_for_their_node() -> None:
    ways = Ways("leader", pretended([3, 1, 4], 8))
    assert [ways.relay_of(home) for home in range(8)] == [0, 0, 0, 3, 4, 4, 4, 4]
    assert [ways.peer_of(2, node) for node in (1, 2)] == [3, 4]
    assert [rank for rank in range(8) if ways.is_relay(rank)] == [0, 3, 4]
    assert ways.rail(0) == (0, 3, 4)


def test_rails_join_the_same_local_ranks() -> None:
    ways = Ways("rail", pretended(2, 6))
    assert [ways.relay_of(home) for home in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [ways.peer_of(3, node) for node in (0, 2)] == [1, 5]
    assert ways.rail(3) == (1, 3, 5)


def test_rails_of_uneven_nodes() -> None:
    # The smallest node has 2 ranks, so there are 2 rails: local ranks 0, 2, 4 and 1, 3.
    ways = Ways("rail", pretended([5, 2, 3], 10))
    assert ways.rail(0) == (0, 2, 4, 5, 7, 9) and ways.rail(1) == (1, 3, 6, 8)
    # Local ranks 0 to 4 of node 0: the same local rank where it exists, else the members of the rail in turn.
    assert [ways.peer_of(home, 2) for home in range(5)] == [7, 8, 9, 8, 7]
    assert [ways.peer_of(home, 1) for home in range(5)] == [5, 6, 5, 6, 5]


@pytest.mark.parametrize("sizes", [[1, 1], [4, 4], [3, 1, 4], [5, 2, 3], [2, 7]])
@pytest.mark.parametrize("route", ["leader", "rail"])
def test_a_peer_is_on_its_node_and_in_the_same_communicator(route: str, sizes: list[int]) -> None:
    nodes = pretended(sizes, sum(sizes))
    ways = Ways(route, nodes)
    for home in range(nodes.n_ranks):
        relay = ways.relay_of(home)
        assert ways.is_relay(relay) and nodes.of[relay] == nodes.of[home]
        for node in set(nodes.of) - {nodes.of[home]}:
            peer = ways.peer_of(home, node)
            assert nodes.of[peer] == node and ways.rail(peer) == ways.rail(relay) and relay in ways.rail(relay)


# ---------------------------------------------------------------- parcels


def test_each_token_goes_to_a_node_once() -> None:
    # Experts 0 to 3 on ranks 0 to 3; nodes of 2 ranks; home 0. Tokens: 0 -> 2, 3; 1 -> 0, 3; 2 -> 1, 0; 3 -> 3, 2.
    table = table_of([0, 1, 2, 3], [0, 1, 2, 3], 4)
    plan = plan_dispatch(np.array([[2, 3], [0, 3], [1, 0], [3, 2]]), table)
    near, far = split_by_node(plan, 0, pretended(2, 4))
    assert [m.destination for m in near] == [0, 1] and list(far) == [1]
    (parcel,) = pack_parcels(plan, table, 2, far, 100)
    # Pairs by slot: expert 2 gets tokens 0 and 3, expert 3 tokens 0, 1 and 3.
    assert plan.pairs[parcel.places].tolist() == [0, 7, 1, 3, 6]
    assert parcel.tokens.tolist() == [0, 1, 3]
    assert parcel.row_of_pair.tolist() == [0, 2, 0, 1, 2]
    assert (parcel.slots.tolist(), parcel.counts.tolist()) == ([2, 3], [2, 3])
    assert parcel.ranks(table) == [2, 3]


def test_parcels_in_pieces_hold_all_pairs_of_their_tokens() -> None:
    table = table_of([0, 1, 2, 3], [0, 1, 2, 3], 4)
    plan = plan_dispatch(np.array([[2, 3], [0, 3], [1, 0], [3, 2]]), table)
    _, far = split_by_node(plan, 0, pretended(2, 4))
    first, second = pack_parcels(plan, table, 2, far, 2)
    assert (first.tokens.tolist(), first.row_of_pair.tolist()) == ([0, 1], [0, 0, 1])
    assert (first.slots.tolist(), first.counts.tolist()) == ([2, 3], [1, 2])
    assert (second.tokens.tolist(), second.row_of_pair.tolist(), second.piece) == ([3], [0, 0], 1)
    assert sorted([*first.places.tolist(), *second.places.tolist()]) == list(range(3, 8))


def test_pieces_are_small_enough_for_their_answers() -> None:
    whole = table_of([0, 1], [0, 1], 2)
    assert [parcel_rows(rows, whole, 2) for rows in (1, 2, 7)] == [1, 1, 3]
    cut = layer_tables(cut_expert(placement_of([0, 1], [0, 1], 3), 3, 0, [0, 2]))[3]
    assert parcel_rows(9, cut, 2) == 2


# ---------------------------------------------------------------- bytes

EXACT, FAST = wire.RowBytes(6, 12, False, 24), wire.RowBytes(6, 12, True, 24)


def a_parcel(row: wire.RowBytes, home: int = 5) -> tuple[wire.Name, Parcel, np.ndarray]:
    parcel = Parcel(2, 0, np.arange(3), np.arange(4), np.array([0, 2, 1, 0]), np.array([7, 9]), np.array([1, 3]))
    name = wire.Name(home, 3, 1, 0, 2)
    weights = np.array([0.5, 0.25, 1, 2], dtype=np.float32) if row.fast else None
    rows = np.arange(18, dtype=np.uint8)
    return name, parcel, wire.write_parcel(name, parcel.slots, parcel.counts, parcel.row_of_pair, weights, rows, row)


@pytest.mark.parametrize("row", [EXACT, FAST], ids=["exact", "fast"])
def test_parcels_read_as_written_alone_and_together(row: wire.RowBytes) -> None:
    frames = [a_parcel(row, home)[2] for home in (5, 6)]
    assert len(frames[0]) == wire.parcel_bytes(3, 4, 2, row) == 64 + 64 + 64
    found = list(wire.read_parcels(np.concatenate(frames), row))
    assert [one.name for one, _ in found] == [wire.Name(5, 3, 1, 0, 2), wire.Name(6, 3, 1, 0, 2)]
    for (one, raw), frame in zip(found, frames, strict=True):
        assert raw.tobytes() == frame.tobytes()
        assert (one.slots.tolist(), one.counts.tolist(), one.row_of_pair.tolist()) == ([7, 9], [1, 3], [0, 2, 1, 0])
        assert one.n_rows == 3 and one.rows.tolist() == list(range(18))
        assert (one.weights is not None and one.weights.tolist() == [0.5, 0.25, 1, 2]) == row.fast


def test_returns_read_as_written() -> None:
    frames = []
    for piece, rows in enumerate((4, 0, 6)):
        frame, body = wire.empty_return(wire.Name(5, 3, 1, piece, 2), rows, EXACT)
        body[:] = piece + 1
        assert len(frame) == wire.return_bytes(99, rows, EXACT)
        frames.append(frame)
    found = list(wire.read_returns(np.concatenate(frames), lambda layer: {3: 12}[layer]))
    assert [(one.name.piece, one.n_rows, len(one.rows)) for one in found] == [(0, 4, 48), (1, 0, 0), (2, 6, 72)]
    assert found[2].rows.tolist() == [3] * 72
    # In fast mode a sum of 24 bytes for every token, however many pairs it has.
    assert wire.return_bytes(3, 99, FAST) == 64 + 128


def test_fan_outs_read_as_written() -> None:
    frame = wire.write_fan_out(3, 1, np.array([0, 2, 1]), np.arange(18, dtype=np.uint8))
    assert len(frame) == wire.fan_out_header(3) + 18 == 64 + 64 + 18
    layer, microbatch, counts, rows = wire.read_fan_out(frame)
    assert (layer, microbatch, counts, rows.tolist()) == (3, 1, (0, 2, 1), list(range(18)))


# ---------------------------------------------------------------- predicted


def routes_by_hand() -> dict[str, np.ndarray]:
    """Two homes on nodes of 2 ranks: home 0 sends the tokens of the parcel above, home 3 one token to 0 and 1."""
    experts = np.array([[2, 3], [0, 3], [1, 0], [3, 2], [0, 1]])
    zeros = np.zeros(5, dtype=np.int64)
    rank, position = np.array([0, 0, 0, 0, 3]), np.arange(5)
    return {
        "rank": rank, "step": zeros, "microbatch": zeros, "layer": zeros + 3, "sequence": zeros,
        "position": position, "experts": experts,
    }  # fmt: skip


def test_rows_between_nodes_by_hand() -> None:
    table = table_of([0, 1, 2, 3], [0, 1, 2, 3], 4)
    assert rows_between_nodes(routes_by_hand(), {3: table}, pretended(2, 4)) == {(3, 0, 1): 3, (3, 1, 0): 1}


@pytest.mark.parametrize(("fast", "back"), [(False, [5, 2]), (True, [3, 1])])
def test_hops_by_hand(fast: bool, back: list[int]) -> None:
    table = table_of([0, 1, 2, 3], [0, 1, 2, 3], 4)
    ways = Ways("leader", pretended(2, 4))
    found = relayed_from_routes(routes_by_hand(), {3: table}, RowSizes(8, 2, 100), ways, fast=fast)
    rows = zip(*(column.tolist() for column in found.values()), strict=True)
    hops = {(KINDS[kind], source, to): (count, nbytes) for source, kind, _, to, count, nbytes in rows}
    width = 32 if fast else 16
    framed = {n: 64 + -(-n * width // 64) * 64 for n in back}
    assert hops == {
        # Home 3's leader is rank 2; its token crosses to rank 0, whose slot is one of the two.
        ("collect", 3, 2): (1, 64 + 64 + 64),
        ("relay", 2, 0): (1, 64 + 64 + 64),
        ("return", 0, 2): (back[1], framed[back[1]]),
        ("deliver", 2, 3): (back[1], back[1] * width),
        # Home 0 is its own leader; its three tokens cross to rank 2, with five pairs.
        ("relay", 0, 2): (3, 64 + 64 + 64),
        ("return", 2, 0): (back[0], framed[back[0]]),
        # Straight and fanned out: rank 0 gets 2 rows of its own and 1 relayed, rank 1 one of each.
        ("dispatch", 0, 0): (3, 0),
        ("answer", 0, 0): (3, 0),
        ("dispatch", 0, 1): (2, 16 + 64 + 64 + 16),
        ("answer", 1, 0): (2, 32),
        ("dispatch", 2, 2): (2, 0),
        ("answer", 2, 2): (2, 0),
        ("dispatch", 2, 3): (3, 64 + 64 + 48),
        ("answer", 3, 2): (3, 48),
    }
