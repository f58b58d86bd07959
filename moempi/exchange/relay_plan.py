"""Who relays for whom, and what a relay is given: pure integers.

Between nodes only relays send. In the route `leader` the first rank of a node relays for all of it; in `rail` every
rank relays for itself, and its peer on another node is of the same *rail*: with s the ranks of the smallest node,
rail r has the ranks whose local rank is r modulo s. Where nodes are alike that is the same local rank everywhere.

A *parcel* is what one dispatch sends to one other node: each token once, however many of its slots are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moempi.exchange.nodes import Nodes
from moempi.exchange.plan import DispatchPlan, Message
from moempi.exchange.slots import LayerTable

RELAYED = ("leader", "rail")


@dataclass(frozen=True)
class Ways:
    """The relays of a route: "leader" or "rail"."""

    route: str
    nodes: Nodes

    @cached_property
    def n_rails(self) -> int:
        """s: ranks of the smallest node, or 1 in the route of leaders."""
        return 1 if self.route == "leader" else min(map(len, self.nodes.ranks))

    def rail(self, rank: int) -> tuple[int, ...]:
        """The relays that a relay may exchange messages with, ascending, itself included."""
        if self.route == "leader":
            return tuple(ranks[0] for ranks in self.nodes.ranks)
        mine = self.nodes.local(rank) % self.n_rails
        return tuple(r for r in range(self.nodes.n_ranks) if self.nodes.local(r) % self.n_rails == mine)

    def is_relay(self, rank: int) -> bool:
        """Whether a rank sends between nodes."""
        return self.relay_of(rank) == rank

    def relay_of(self, home: int) -> int:
        """The relay on a home's own node."""
        return home if self.route == "rail" else self.nodes.leader(self.nodes.of[home])

    def peer_of(self, home: int, node: int) -> int:
        """The relay on another node, for what a home sends there."""
        if self.route == "leader":
            return self.nodes.leader(node)
        turn, rail = divmod(self.nodes.local(home), self.n_rails)
        members = self.nodes.ranks[node][rail :: self.n_rails]
        return members[turn % len(members)]


@dataclass(frozen=True)
class Parcel:
    """Part of a dispatch, for the slots of one other node.

    Pairs are in the order of the dispatch plan: by slot, then by pair.
    """

    node: int
    piece: int
    tokens: np.ndarray  # [R] rows of the microbatch, ascending, each once
    places: np.ndarray  # [P] rows of the dispatch plan, one for every (token, slot)
    row_of_pair: np.ndarray  # [P] which of the R rows a pair sends
    slots: np.ndarray  # [S] slots of the layer that get rows of it, ascending
    counts: np.ndarray  # [S] rows of each

    def ranks(self, table: LayerTable) -> list[int]:
        """The ranks that hold its slots, ascending."""
        return np.unique(table.rank[self.slots]).tolist()


def split_by_node(plan: DispatchPlan, home: int, nodes: Nodes) -> tuple[list[Message], dict[int, list[Message]]]:
    """Messages that stay on the home's node, and the others by node."""
    near: list[Message] = []
    far: dict[int, list[Message]] = {}
    for message in plan.messages:
        node = nodes.of[message.destination]
        (near if node == nodes.of[home] else far.setdefault(node, [])).append(message)
    return near, far


def pack_parcels(
    plan: DispatchPlan, table: LayerTable, top_k: int, far: dict[int, list[Message]], most_rows: int
) -> Iterator[Parcel]:
    """The parcels of a dispatch, in pieces of at most `most_rows` rows [R].

    Args:
        top_k: K; pair p is of token p // K.
        far: messages by node, from `split_by_node`.
    """
    slot_of_place = np.repeat(np.arange(len(table.rank)), np.diff(plan.slot_begin))
    for node, messages in sorted(far.items()):
        places = np.concatenate([np.arange(m.lo, m.hi) for m in messages])
        tokens, row_of_pair = np.unique(plan.pairs[places] // top_k, return_inverse=True)
        for piece, lo in enumerate(range(0, len(tokens), most_rows)):
            mine = np.flatnonzero((row_of_pair >= lo) & (row_of_pair < lo + most_rows))
            slots, counts = np.unique(slot_of_place[places[mine]], return_counts=True)
            rows = tokens[lo : lo + most_rows]
            yield Parcel(node, piece, rows, places[mine], row_of_pair[mine] - lo, slots, counts)


def parcel_rows(piece_rows: int, table: LayerTable, top_k: int) -> int:
    """Most rows of a parcel, so that its answers, one for every slot of a token, are not more than `piece_rows`."""
    most_answers = top_k * max(map(len, table.covers))
    return max(1, piece_rows // most_answers)
