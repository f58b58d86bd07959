"""Which route a job takes, by hand-worked tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_plan import table_of

from moempi.exchange.nodes import Nodes, one_node, pretended
from moempi.exchange.slots import LayerTable
from moempi.planning import routes
from moempi.planning.links import Link, Links, within_and_between
from moempi.planning.routes import Work, choose_route

NODES = pretended(2, 4)
TABLE = table_of([0, 1, 2, 3], [0, 1, 2, 3], 4)  # one expert on each of four ranks
WORK = Work(steps=((100.0, 10.0),), top_k=2, sent=1000, answered=1000)


def links(latency: float, bandwidth: float, n_ranks: int = 4, nodes: Nodes = NODES) -> Links:
    """All pairs once; inside a node 1 us and 10 GB/s, between nodes as given."""
    pairs = np.array([(a, b) for a in range(n_ranks) for b in range(a + 1, n_ranks)]).T
    same = np.array([nodes.of[a] == nodes.of[b] for a, b in pairs.T])
    return Links(pairs[0], pairs[1], np.where(same, 1e-6, latency), np.where(same, 1e10, bandwidth))


def test_links_by_kind() -> None:
    within, between = within_and_between(links(5e-5, 1e8), NODES)
    assert within == Link(1e-6, 1e10) and between == Link(5e-5, 1e8)
    alone, none = within_and_between(links(5e-5, 1e8), one_node(4))
    assert alone is not None and none is None


def test_shares_of_ranks_and_nodes() -> None:
    shares = routes.find_shares(NODES, {3: TABLE}, 2)
    assert shares.rank.tolist() == [0.25] * 4 and shares.node.tolist() == [0.5, 0.5]
    # 6 pairs of experts, 1 of them with none on the node.
    assert shares.distinct == pytest.approx([5 / 6, 5 / 6])


def test_shares_of_replicas() -> None:
    # Expert 0 on ranks 0 and 2, so half of its rows go to each node; expert 1 on rank 1.
    table = table_of([0, 1, 2], [0, 1, 0], 4, replicas=[0, 0, 1])
    shares = routes.find_shares(NODES, {3: table}, 1)
    assert shares.rank.tolist() == [0.25, 0.5, 0.25, 0] and shares.node.tolist() == [0.75, 0.25]


def test_bytes_of_the_busiest_node_by_hand() -> None:
    shares = routes.find_shares(NODES, {3: TABLE}, 2)
    # 2 homes x 100 tokens x 1 pair out, and as many answers back for the other node's homes.
    assert routes.busiest_bytes("direct", NODES, shares, 100, WORK) == pytest.approx(400_000)
    # Relayed, a token crosses once: 5/6 of them do. The answers come back for every pair.
    for route in ("leader", "rail"):
        assert routes.busiest_bytes(route, NODES, shares, 100, WORK) == pytest.approx(200_000 * (5 / 6 + 1))
    # Fast: and come back as one float32 sum of 2000 bytes.
    fast = replace(WORK, summed=2000)
    assert routes.busiest_bytes("rail", NODES, shares, 100, fast) == pytest.approx(200_000 * 5 / 6 * 3)
    assert routes.busiest_bytes("direct", NODES, shares, 100, fast) == pytest.approx(400_000)


def test_messages_of_a_rank_by_hand() -> None:
    # Many tokens, so every home sends to every slot. Each dispatch has its answer: twice.
    ones = np.ones(4), np.ones(2)
    assert routes.counts_of("direct", NODES, *ones, 0) == (2 * (3 + 3), 0)
    # Beside 1 + 1; a parcel out and one in; of the one in a part goes to the rank beside, as one comes from it.
    assert routes.counts_of("rail", NODES, *ones, 0) == (2 * (2 + 1 + 1 + 1 + 1), 2 * 1)
    # The leader: beside 2; one collected; one out and one in; two parcels spread to the rank beside.
    assert routes.counts_of("leader", NODES, *ones, 0) == (2 * (2 + 1 + 2 + 2), 2 * (1 + 2))
    # The rank behind it: beside 2; a parcel to the leader; two parts of parcels from it.
    assert routes.counts_of("leader", NODES, *ones, 1) == (2 * (2 + 1 + 2), 0)


def test_ranks_that_share_a_core_wait_for_each_other() -> None:
    shares = routes.find_shares(NODES, {3: TABLE}, 2)
    leader, other = 14 * 60e-6 + 6 * 300e-6, 10 * 60e-6
    assert routes.host_seconds("leader", NODES, shares, 100, 2) == pytest.approx(leader)
    assert routes.host_seconds("leader", NODES, shares, 100, 2, 4.0) == pytest.approx(2 * leader + 2 * other)
    assert routes.host_seconds("direct", NODES, shares, 100, 2, 4.0) == pytest.approx(4 * 12 * 60e-6)


@pytest.mark.parametrize("layers", [1, 3])
def test_seconds_of_the_whole_job_by_hand(layers: int) -> None:
    tables = dict.fromkeys(range(layers), TABLE)
    seconds = routes.estimate(NODES, tables, WORK, Link(1e-6, 1e10), Link(5e-5, 1e8))
    host = {"direct": 12 * 60e-6, "leader": 14 * 60e-6 + 6 * 300e-6, "rail": 12 * 60e-6 + 2 * 300e-6}
    assert seconds["direct"] == pytest.approx(10 * layers * (2 * 5e-5 + host["direct"] + 4e5 / 1e8))
    assert seconds["leader"] == pytest.approx(10 * layers * (2 * 5.2e-5 + host["leader"] + 2e5 * 11 / 6 / 1e8))
    assert seconds["rail"] == pytest.approx(10 * layers * (2 * 5.1e-5 + host["rail"] + 2e5 * 11 / 6 / 1e8))


# ---------------------------------------------------------------- the choice


def spread(nodes: int, ranks: int) -> tuple[Nodes, LayerTable]:
    """One expert on every rank."""
    n = nodes * ranks
    return pretended(ranks, n), table_of(list(range(n)), list(range(n)), n)


@pytest.mark.parametrize(
    ("tokens", "top_k", "bandwidth", "expected"),
    [
        # A thin link: what crosses twice costs most, so relays; on rails the work is shared.
        (50, 4, 1e8, "rail"),
        # K = 1: no token crosses twice, and on a wide link a relay is only another message.
        (500, 1, 1e11, "direct"),
        # Where bytes cost nothing: a rail sends one message where direct sends eight, but then fans it out.
        (8, 8, 1e13, "direct"),
    ],
)
def test_auto_takes_what_it_estimates_least(tokens: int, top_k: int, bandwidth: float, expected: str) -> None:
    nodes, table = spread(4, 8)
    work = Work(((float(tokens), 100.0),), top_k, 2000, 2000)
    chosen = choose_route("auto", nodes, {3: table}, work, links(2e-5, bandwidth, 32, nodes))
    seconds = {name: float(chosen.reason.split(f"{name} ")[1].split(" ")[0].strip(",")) for name in routes.ROUTES}
    assert chosen.name == expected == min(seconds, key=seconds.__getitem__), chosen.reason
    assert "between nodes 20 us" in chosen.reason


def test_auto_relays_less_where_ranks_share_cores() -> None:
    nodes, table = spread(4, 8)
    work, found = Work(((50.0, 100.0),), 4, 2000, 2000), links(2e-5, 1e8, 32, nodes)
    assert choose_route("auto", nodes, {3: table}, work, found).name == "rail"
    crowded = choose_route("auto", nodes, {3: table}, work, replace(found, oversubscription=16.0))
    assert crowded.name == "direct" and "16.0 ranks to a core" in crowded.reason


def test_auto_needs_several_nodes_and_measured_links() -> None:
    tables = {3: TABLE}
    assert choose_route("auto", NODES, tables, WORK, None).name == "direct"
    assert "no links were measured" in choose_route("auto", NODES, tables, WORK, None).reason
    assert "no pair of ranks on two nodes" in choose_route("auto", NODES, tables, WORK, links(1, 1, 2)).reason
    for wanted in ("auto", "leader", "rail"):
        assert choose_route(wanted, one_node(4), tables, WORK, None) == routes.Route("direct", "there is one node")
        assert choose_route(wanted, NODES, {}, WORK, None).name == "direct"
    for wanted in routes.ROUTES:
        assert choose_route(wanted, NODES, tables, WORK, None) == routes.Route(wanted, "exchange.route says so")


def test_steps_of_a_mean_home() -> None:
    # Prompts of 10 and 30 with 5 and 9 new tokens, two homes, 2 tokens a step generating and 8 prefilling.
    assert routes.steps_of_a_home([14, 38], [5, 9], 2, 2, 8) == ((2, 3.5), (8, 2.5))
