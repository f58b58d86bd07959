"""What all parts of a relay have in common: the communicators of its hops, and the sizes of what travels on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpi4py import MPI

from moempi.exchange.lane import Group
from moempi.exchange.relay_plan import Ways
from moempi.exchange.relay_wire import RowBytes
from moempi.exchange.slots import LayerTable, answer_itemsize


@dataclass(frozen=True)
class Hops:
    """A communicator for every hop of a relayed row, so that a probe sees only what it is for.

    `onward` and `returns` are of the leaders, or of one rail; None on ranks that are no relays.
    """

    collect: Group  # home to relay, within the node
    onward: Group | None  # relay to relay
    fan_out: Group  # relay to slots, within the node
    answers: Group  # and back
    returns: Group | None  # relay to relay, back
    deliver: Group  # relay to home

    def free(self) -> None:
        """Give the communicators back. Collective."""
        for group in (self.collect, self.onward, self.fan_out, self.answers, self.returns, self.deliver):
            if group is not None:
                group.comm.Free()


def _doubles(comm: MPI.Comm, members: tuple[int, ...], count: int) -> list[Group]:
    assert isinstance(comm, MPI.Intracomm)
    return [Group(comm if number == 0 else comm.Dup(), members) for number in range(count)]


def build_hops(world: MPI.Intracomm, ways: Ways) -> Hops:
    """Split the communicators `node` and `leaders` or `rail` off the world, and duplicate them. Collective."""
    nodes, rank = ways.nodes, world.rank
    node = world.Split(nodes.of[rank], rank)
    collect, fan_out, answers, deliver = _doubles(node, nodes.ranks[nodes.of[rank]], 4)
    relays = ways.rail(rank) if ways.is_relay(rank) else ()
    peers = world.Split(relays[0] if relays else MPI.UNDEFINED, rank)
    onward, returns = _doubles(peers, relays, 2) if relays else (None, None)
    return Hops(collect, onward, fan_out, answers, returns, deliver)


@dataclass(frozen=True)
class Sizes:
    """Bytes of rows, messages and budgets.

    Args:
        budget: bytes that each class of hops may hold on a rank.
        most_bytes: of a message that several parcels or returns share.
        rows: bytes of a row, by MoE layer.
        piece_rows: most rows of a message.
        top_k: K.
    """

    budget: int
    most_bytes: int
    rows: Mapping[int, RowBytes]
    piece_rows: int
    top_k: int

    @property
    def any_row(self) -> RowBytes:
        """For what layers have in common: bytes of a row that is sent, and the mode."""
        return next(iter(self.rows.values()))

    def returned_width(self, layer: int) -> int:
        """Bytes of a row that comes back between nodes."""
        row = self.rows[layer]
        return row.summed if row.fast else row.answered


def row_bytes(tables: Mapping[int, LayerTable], d_model: int, itemsize: int, *, fast: bool) -> dict[int, RowBytes]:
    """Bytes of a row in every MoE layer."""
    return {
        layer: RowBytes(d_model * itemsize, d_model * answer_itemsize(table.cut, itemsize), fast, 4 * d_model)
        for layer, table in tables.items()
    }


class TagCounter:
    """Tags of the messages to each peer: a counter, so that an answer finds what it is to."""

    _LEAST_BOUND = 2**15  # of tags, that any MPI library grants; no peer is ever owed so many answers

    def __init__(self) -> None:
        self._next: dict[int, int] = {}

    def next(self, peer: int) -> int:
        """The tag of the next message to a peer."""
        tag = self._next.get(peer, 0)
        self._next[peer] = (tag + 1) % self._LEAST_BOUND
        return tag
