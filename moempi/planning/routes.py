"""The route of rows between nodes: direct, leader or rail. Pure: chosen from the job, the nodes and measured links.

The estimate takes experts as chosen alike and counts, for one step of every home in one layer, there and back:

    latency of the hops that follow one another
    + PER_MESSAGE for each message that a rank sends or receives, and PER_PARCEL for each that it passes on
    + bytes that leave the busiest node / bandwidth between nodes

The second is that of the busiest rank, or of the mean rank times the ranks that share its core, whichever is more.

It leaves out what all routes have in common, what overlaps with computing, and queues. Its use is to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moempi.exchange.nodes import Nodes
from moempi.exchange.slots import LayerTable
from moempi.planning.links import Link, Links, within_and_between

# Seconds of a core, as `benchmarks/host_cost.py` and `benchmarks/cluster_routes.py` find them on two slow ones.
PER_MESSAGE = 60e-6  # sent or received
PER_PARCEL = 300e-6  # passed on by a relay: taken apart, sent on, its answers put together
ROUTES = ("direct", "leader", "rail")


@dataclass(frozen=True)
class Route:
    """The route of a job, and why."""

    name: str  # one of ROUTES
    reason: str


@dataclass(frozen=True)
class Work:
    """What a job sends.

    Args:
        steps: (tokens of a microbatch, how many such steps a home takes), of every kind of step.
        top_k: K.
        sent: bytes of a row on its way to a slot.
        answered: bytes of an answer.
        summed: bytes of a node's sum for a token, in fast mode; 0 in exact mode, where the answers come back.
    """

    steps: tuple[tuple[float, float], ...]
    top_k: int
    sent: int
    answered: int
    summed: int = 0


@dataclass(frozen=True)
class Shares:
    """Where a pair (token, k) goes, all experts being chosen alike; means over the layers."""

    rank: np.ndarray  # [N] rows that the rank gets of one pair
    node: np.ndarray  # [nodes] the same by node
    distinct: np.ndarray  # [nodes] chance that at least one of a token's K pairs goes to the node


def choose_route(wanted: str, nodes: Nodes, tables: Mapping[int, LayerTable], work: Work, links: Links | None) -> Route:
    """The route that a job takes.

    Args:
        wanted: "auto", or one of ROUTES.
        links: measured; None: not known.
    """
    if nodes.n_nodes == 1 or not tables:
        return Route("direct", "there is one node" if tables else "the model has no experts")
    if wanted != "auto":
        return Route(wanted, "exchange.route says so")
    if links is None:
        return Route("direct", "no links were measured: exchange.links names none")
    within, between = within_and_between(links, nodes)
    if between is None:
        return Route("direct", "exchange.links has no pair of ranks on two nodes")
    seconds = estimate(nodes, tables, work, within or Link(0.0, np.inf), between, links.oversubscription)
    best = min(ROUTES, key=seconds.__getitem__)
    shown = ", ".join(f"{name} {seconds[name]:.3g}" for name in ROUTES)
    return Route(
        best,
        f"estimated seconds of exchange: {shown} (between nodes {between.latency * 1e6:.0f} us and "
        f"{between.bandwidth / 1e6:.0f} MB/s, {links.oversubscription:.1f} ranks to a core)",
    )


def steps_of_a_home(
    positions: Sequence[int], new_tokens: Sequence[int], n_homes: int, decode: int, prefill: int
) -> tuple[tuple[float, float], ...]:
    """(tokens of a microbatch, steps) of a mean home: those that generate, then those that prefill.

    Args:
        positions: of every sequence: its prompt and all new tokens but the last.
        new_tokens: of every sequence.
        decode, prefill: tokens of a microbatch in a step of each kind.
    """
    generated = sum(new_tokens)
    prompts = sum(positions) - generated + len(new_tokens)
    return (decode, generated / n_homes / decode), (prefill, prompts / n_homes / prefill)


def estimate(
    nodes: Nodes,
    tables: Mapping[int, LayerTable],
    work: Work,
    within: Link,
    between: Link,
    oversubscription: float = 1.0,
) -> dict[str, float]:
    """Seconds that the exchange of a whole job takes in every route."""
    shares = find_shares(nodes, tables, work.top_k)
    hops = {
        "direct": between.latency,
        "leader": between.latency + 2 * within.latency,
        "rail": between.latency + within.latency,
    }
    seconds = {}
    for name in ROUTES:
        seconds[name] = len(tables) * sum(
            count
            * (
                2 * hops[name]
                + host_seconds(name, nodes, shares, tokens, work.top_k, oversubscription)
                + busiest_bytes(name, nodes, shares, tokens, work) / between.bandwidth
            )
            for tokens, count in work.steps
        )
    return seconds


def find_shares(nodes: Nodes, tables: Mapping[int, LayerTable], top_k: int) -> Shares:
    """Shares of ranks and nodes under a uniform load."""
    layers = [_layer_shares(nodes, table, top_k) for table in tables.values()]
    rank, node, distinct = (np.mean(column, axis=0) for column in zip(*layers, strict=True))
    return Shares(rank, node, distinct)


def _layer_shares(nodes: Nodes, table: LayerTable, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_experts = len(table.n_replicas)
    of = np.array(nodes.of)
    rank, touched = np.zeros(table.n_ranks), np.zeros(nodes.n_nodes)
    for slots in table.covers:
        weight = 1 / (n_experts * table.n_replicas[table.expert[slots[0]]])
        ranks = table.rank[list(slots)]
        np.add.at(rank, ranks, weight)
        touched[np.unique(of[ranks])] += weight
    node = np.bincount(of, weights=rank, minlength=nodes.n_nodes)
    # K different experts, none of which is on the node.
    misses = [(n_experts * (1 - touched) - k) / (n_experts - k) for k in range(top_k)]
    return rank, node, 1 - np.prod(np.clip(misses, 0, 1), axis=0)


# ---------------------------------------------------------------- one step of every home in one layer


def busiest_bytes(route: str, nodes: Nodes, shares: Shares, tokens: float, work: Work) -> float:
    """Bytes that leave the busiest node: rows to other nodes, and what goes back to their homes."""
    sizes = np.array([len(ranks) for ranks in nodes.ranks])
    pairs, once = tokens * work.top_k * shares.node, tokens * shares.distinct  # of one home, by node
    out = (pairs if route == "direct" else once) * work.sent
    back = once * work.summed if work.summed and route != "direct" else pairs * work.answered
    leaving = sizes * (out.sum() - out) + (sizes.sum() - sizes) * back
    return float(leaving.max())


def host_seconds(
    route: str, nodes: Nodes, shares: Shares, tokens: float, top_k: int, oversubscription: float = 1.0
) -> float:
    """What messages take of the rank that has most of them, or of all ranks that share a core."""
    to_rank = np.minimum(1.0, tokens * top_k * shares.rank)  # chance that a home has any rows for it
    to_node = np.minimum(1.0, tokens * top_k * shares.node)
    counts = [counts_of(route, nodes, to_rank, to_node, rank) for rank in range(nodes.n_ranks)]
    seconds = [PER_MESSAGE * messages + PER_PARCEL * parcels for messages, parcels in counts]
    return max(max(seconds), oversubscription * sum(seconds) / len(seconds))


def counts_of(route: str, nodes: Nodes, to_rank: np.ndarray, to_node: np.ndarray, rank: int) -> tuple[float, float]:
    """(messages that a rank sends and receives, parcels that it passes on), there and back.

    Args:
        to_rank: [N], chance that a home has rows for the rank.
        to_node: [nodes], the same for the node.
    """
    node = nodes.of[rank]
    mine, size = list(nodes.ranks[node]), len(nodes.ranks[node])
    far = nodes.n_ranks - size  # homes on other nodes
    beside = to_rank[mine].sum() - to_rank[rank]  # a home's messages to other ranks of its node
    parcels = to_node.sum() - to_node[node]  # a home's messages to other nodes
    near = beside + (size - 1) * to_rank[rank]
    if route == "direct":
        return 2 * float(near + to_rank.sum() - to_rank[mine].sum() + far * to_rank[rank]), 0.0
    if route == "rail":
        come = far / size  # homes whose parcels come to this rank
        spread = come * beside + (far - come) * to_rank[rank]
        return 2 * float(near + parcels + come * to_node[node] + spread), 2 * float(come * to_node[node])
    if rank != mine[0]:
        return 2 * float(near + parcels + far * to_rank[rank]), 0.0
    collected, peers = (size - 1) * parcels, 2 * min(nodes.n_nodes - 1, size * parcels)
    passed_on = collected + far * to_node[node]
    return 2 * float(near + collected + peers + far * beside), 2 * float(passed_on)
