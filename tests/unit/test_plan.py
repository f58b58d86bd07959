"""What goes where, by hand-worked tables: covers, messages, pieces, tags."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moempi.exchange.plan import (
    Message,
    Tags,
    cut_into_pieces,
    header_bytes,
    header_places,
    message_pieces,
    plan_dispatch,
    plan_messages,
)
from moempi.exchange.predict import RowSizes, messages_from_routes
from moempi.exchange.slots import LayerTable, layer_tables
from moempi.exchange.wire import frame, read_header
from moempi.planning.placement import Placement, cut_expert


def table_of(ranks: list[int], experts: list[int], n_ranks: int, replicas: list[int] | None = None) -> LayerTable:
    """Layer 3 with whole experts: slot i holds experts[i] on ranks[i]."""
    return layer_tables(placement_of(ranks, experts, n_ranks, replicas))[3]


def placement_of(ranks: list[int], experts: list[int], n_ranks: int, replicas: list[int] | None = None) -> Placement:
    n = len(ranks)
    columns = {"layer": [3] * n, "expert": experts, "replica": replicas or [0] * n, "rank": ranks}
    return Placement.from_slots(n_ranks, max(experts) + 1, 4, (3,), columns | {"lo": [0] * n, "hi": [4] * n})


def test_one_expert_per_rank() -> None:
    table = table_of([0, 1, 2], [0, 1, 2], 3)
    plan = plan_dispatch(np.array([[2, 0], [0, 2], [2, 0]]), table)
    assert plan.pairs.tolist() == [1, 2, 5, 0, 3, 4]
    # Rank 1 gets no rows, and so no message.
    assert plan.messages == (Message(0, 0, 3, (3,)), Message(2, 3, 6, (3,)))
    assert plan.slot_begin.tolist() == [0, 3, 3, 6]


def test_several_slots_on_a_rank() -> None:
    table = table_of([0, 0, 1, 1], [0, 2, 1, 3], 2)
    # Slots by rank: experts 0, 2 on rank 0 and 1, 3 on rank 1.
    covers = table.choose_covers(np.array([[3, 2], [2, 0]]), np.array([0, 0]), np.array([0, 1]))
    assert covers.tolist() == [[3, 1], [1, 0]]
    plan = plan_dispatch(covers, table)
    assert plan.pairs.tolist() == [3, 1, 2, 0]
    assert plan.messages == (Message(0, 0, 3, (1, 2)), Message(1, 3, 4, (0, 1)))


def test_replicas_take_turns_by_sequence_position_and_layer() -> None:
    table = table_of([0, 1, 2], [0, 0, 1], 3, replicas=[0, 1, 0])
    experts = np.array([[0], [0], [0], [1]])
    covers = table.choose_covers(experts, np.array([4, 4, 5, 5]), np.array([0, 1, 1, 2]))
    # (4 + 0 + 3) is odd, (4 + 1 + 3) even, (5 + 1 + 3) odd; expert 1 has one copy.
    assert table.rank[covers.ravel()].tolist() == [1, 0, 1, 2]


def test_the_load_of_an_expert_is_that_of_all_its_replicas() -> None:
    table = table_of([0, 1, 2, 2, 0, 1], [0, 0, 0, 1, 2, 2], 3, replicas=[0, 1, 2, 0, 0, 1])
    # Slots, and so covers, by rank: experts 0, 2 on rank 0, then 0, 2, then 0, 1.
    assert table.load(np.array([1, 10, 2, 20, 4, 100])).tolist() == [7, 100, 30]
    assert table_of([0, 1, 1], [2, 0, 1], 2).load(np.array([5, 6, 7])).tolist() == [6, 7, 5]


def test_rows_of_a_cut_expert_go_to_every_piece() -> None:
    table = layer_tables(cut_expert(placement_of([0, 1], [0, 1], 3), 3, 0, [0, 2]))[3]
    assert table.cut and table.covers == ((0, 2), (1,))
    plan = plan_dispatch(np.array([[0], [1], [0]]), table)
    assert plan.pairs.tolist() == [0, 2, 1, 0, 2]
    assert plan.messages == (Message(0, 0, 2, (2,)), Message(1, 2, 3, (1,)), Message(2, 3, 5, (2,)))


def test_rows_lie_behind_the_headers_of_ranks_with_slots() -> None:
    """Ranks 0 and 3 hold two slots, rank 1 one, rank 2 none; three rows for each header, and rank 1 gets nothing."""
    table = table_of([0, 0, 1, 3, 3], [0, 1, 2, 3, 4], 4)
    messages = plan_messages(np.array([2, 0, 0, 1, 4]), table, header_rows=3)
    assert messages == (Message(0, 3, 5, (2, 0)), Message(3, 11, 16, (1, 4)))
    assert header_places(table, 3).tolist() == [[0, 3, 64], [0, 3, 64], [2, 6, 0], [3, 9, 64], [3, 9, 64]]
    assert header_places(table, 0)[:, 1].tolist() == [0] * 5


def test_no_tokens_no_messages() -> None:
    plan = plan_dispatch(np.empty((0, 2), dtype=np.int64), table_of([0, 1], [0, 1], 2))
    assert plan.messages == () and plan.n_pairs == 0


def test_pieces_carry_their_own_rows_per_slot() -> None:
    message = Message(1, 10, 17, (3, 0, 4))
    assert list(cut_into_pieces(message, 7)) == [message]
    assert list(cut_into_pieces(message, 3)) == [
        Message(1, 10, 13, (3, 0, 0), 0),
        Message(1, 13, 16, (0, 0, 3), 1),
        Message(1, 16, 17, (0, 0, 1), 2),
    ]


@pytest.mark.parametrize("most,row,piece,expected", [(10, 4, 100, (1, 25)), (10, 4, 16, (3, 4)), (5, 8, 1, (5, 1))])
def test_how_many_pieces(most: int, row: int, piece: int, expected: tuple[int, int]) -> None:
    assert message_pieces(most, row, piece) == expected


def test_tags_are_distinct_and_read_back() -> None:
    tags = Tags(n_microbatches=3, n_pieces=2)
    named = {tags.of(layer, m, p): (layer, m) for layer in range(5) for m in range(3) for p in range(2)}
    assert len(named) == 30 and max(named) == tags.bound(5)
    assert all((tags.layer(tag), tags.microbatch(tag)) == name for tag, name in named.items())


def test_headers_only_where_there_are_several_slots() -> None:
    assert [header_bytes(n) for n in (1, 2, 16, 17)] == [0, 64, 64, 128]
    rows = torch.arange(6, dtype=torch.float32).view(3, 2)
    assert frame(rows, (3,)).view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    message = torch.from_numpy(frame(rows, (1, 0, 2)))
    assert read_header(message, 3) == (1, 0, 2)
    assert torch.equal(message[64:].view(torch.float32).view(3, 2), rows)


def test_messages_from_routes_by_hand() -> None:
    tables = layer_tables(placement_of([0, 1], [0, 1], 2))
    # Rank 0, one step, two tokens: expert 1 twice, expert 0 twice.
    routes = {name: np.zeros(2, dtype=np.int64) for name in ("rank", "step", "microbatch", "sequence")}
    routes |= {"layer": np.array([3, 3]), "position": np.array([0, 1]), "experts": np.array([[0, 1], [1, 0]])}
    found = messages_from_routes(routes, tables, RowSizes(d_model=8, itemsize=2, most_rows=100))
    rows = list(zip(*(found[key].tolist() for key in found), strict=True))
    # source, kind, layer, destination, rows, bytes, messages
    assert rows == [(0, 0, 3, 0, 2, 0, 0), (0, 0, 3, 1, 2, 32, 1), (0, 1, 3, 0, 2, 0, 0), (1, 1, 3, 0, 2, 32, 1)]
