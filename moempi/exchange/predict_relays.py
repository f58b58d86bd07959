"""What a run with relays must have sent, computed from the routes in its trace: pure integers, no MPI.

Rows and bytes of every hop follow from the routes. How many parcels shared a message does not: it depends on what was
there when a relay had its turn, so messages are not predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moempi.exchange.nodes import Nodes
from moempi.exchange.predict import RowSizes, add_up, as_columns, direct_links, rows_of_layer, rows_per_dispatch
from moempi.exchange.relay_plan import Ways, parcel_rows
from moempi.exchange.relay_wire import RowBytes, fan_out_header, parcel_bytes, return_bytes, return_rows
from moempi.exchange.slots import LayerTable
from moempi.stages import ANSWER_KIND, COLLECT_KIND, DELIVER_KIND, DISPATCH_KIND, RELAY_KIND, RETURN_KIND

COUNTS = ("rows", "bytes")


def rows_between_nodes(
    routes: Mapping[str, np.ndarray], tables: Mapping[int, LayerTable], nodes: Nodes
) -> dict[tuple[int, int, int], int]:
    """Rows that cross by relay, by (layer, node of the home, other node): the distinct (token, node) pairs.

    Args:
        routes: as of `predict.messages_from_routes`.
    """
    of = np.array(nodes.of)
    crossing: dict[tuple[int, int, int], int] = {}
    for layer, table in tables.items():
        homes, token, slot = rows_of_layer(routes, layer, table)
        pairs = np.unique(np.stack([token, of[table.rank[slot]]]), axis=1)
        ends = np.stack([of[homes[0]][pairs[0]], pairs[1]])
        found, count = np.unique(ends[:, ends[0] != ends[1]], axis=1, return_counts=True)
        for source, destination, rows in zip(*found.tolist(), count.tolist(), strict=True):
            crossing[layer, source, destination] = rows
    return crossing


def relayed_from_routes(
    routes: Mapping[str, np.ndarray], tables: Mapping[int, LayerTable], sizes: RowSizes, ways: Ways, *, fast: bool
) -> dict[str, np.ndarray]:
    """Rows and bytes of every link and hop of a relayed route, as `/traffic` of the same run's trace has them.

    Args:
        routes, tables, sizes: as of `predict.messages_from_routes`.
        fast: whether each node's answers came back as one sum for each token.

    Returns:
        int64 columns source, kind, layer, destination, rows, bytes; sorted by the first four.
    """
    links: list[np.ndarray] = []
    for layer, table in sorted(tables.items()):
        row = RowBytes(sizes.dispatched(), sizes.answered(table), fast, 4 * sizes.d_model)
        homes, token, slot = rows_of_layer(routes, layer, table)
        of = np.array(ways.nodes.of)
        far = of[homes[0][token]] != of[table.rank[slot]]
        # What stays on its node goes straight to its rank.
        near = direct_links(*rows_per_dispatch(homes, token[~far], slot[~far], table), layer, table, sizes)
        links += [link[:, :6] for link in near]
        most_rows = parcel_rows(sizes.most_rows, table, routes["experts"].shape[1])
        parcels = _parcels(homes, token[far], slot[far], table, ways, most_rows)
        links += [*_between(parcels, layer, row, ways), *_within(parcels, layer, table, row, ways)]
    return as_columns([_merged(links)], COUNTS)


def _merged(each: list[np.ndarray]) -> np.ndarray:
    """Links that occur more than once, as near and fanned out dispatches may, added up: [links, 6]."""
    links = np.concatenate([np.empty((0, 6), dtype=np.int64), *each])
    named, place = np.unique(links[:, :4], axis=0, return_inverse=True)
    totals = np.zeros((len(named), links.shape[1] - 4), dtype=np.int64)
    np.add.at(totals, place.ravel(), links[:, 4:])
    return np.concatenate([named, totals], axis=1)


@dataclass(frozen=True)
class _Parcels:
    """All parcels of a layer, and what each brings to each rank."""

    home: np.ndarray  # [M]
    node: np.ndarray  # [M]
    rows: np.ndarray  # [M] tokens
    pairs: np.ndarray  # [M] (token, slot)
    slots: np.ndarray  # [M] slots that get any
    part_of: np.ndarray  # [Q] parcel
    part_rank: np.ndarray  # [Q] rank that gets rows of it
    part_rows: np.ndarray  # [Q]


def _parcels(
    homes: np.ndarray, token: np.ndarray, slot: np.ndarray, table: LayerTable, ways: Ways, most_rows: int
) -> _Parcels:
    rank = table.rank[slot]
    node = np.array(ways.nodes.of)[rank]
    # A token's place among those that its dispatch sends to the node says which piece it is in.
    sent, which = np.unique(np.stack([token, node]), axis=1, return_inverse=True)
    keys = np.concatenate([homes[:, sent[0]], sent[1:]])
    dispatches, group = np.unique(keys, axis=1, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    begin = np.searchsorted(group.ravel()[order], np.arange(dispatches.shape[1]))
    place = np.empty(sent.shape[1], dtype=np.int64)
    place[order] = np.arange(sent.shape[1]) - begin[group.ravel()[order]]
    pieces, parcel = np.unique(np.stack([group.ravel(), place // most_rows]), axis=1, return_inverse=True)
    mine = parcel.ravel()[which.ravel()]
    count = pieces.shape[1]
    slots = np.unique(np.stack([mine, slot]), axis=1)
    parts, part_rows = np.unique(np.stack([mine, rank]), axis=1, return_counts=True)
    return _Parcels(
        home=dispatches[0][pieces[0]],
        node=dispatches[3][pieces[0]],
        rows=np.bincount(parcel.ravel(), minlength=count),
        pairs=np.bincount(mine, minlength=count),
        slots=np.bincount(slots[0], minlength=count),
        part_of=parts[0],
        part_rank=parts[1],
        part_rows=part_rows,
    )


def _between(parcels: _Parcels, layer: int, row: RowBytes, ways: Ways) -> list[np.ndarray]:
    """From homes to the relays of other nodes, and back."""
    sizes = list(zip(parcels.rows.tolist(), parcels.pairs.tolist(), parcels.slots.tolist(), strict=True))
    out = np.array([(r, parcel_bytes(r, p, s, row)) for r, p, s in sizes], dtype=np.int64).reshape(-1, 2).T
    back = np.array([(return_rows(r, p, row), return_bytes(r, p, row)) for r, p, _ in sizes], dtype=np.int64)
    back = back.reshape(-1, 2).T
    width = row.summed if row.fast else row.answered
    relay, peer = _relays(parcels, ways)
    collected = relay != parcels.home
    delivered = np.stack([back[0], back[0] * width])[:, collected]
    home = parcels.home[collected]
    return [
        add_up(home, COLLECT_KIND, layer, relay[collected], out[:, collected]),
        add_up(relay, RELAY_KIND, layer, peer, out),
        add_up(peer, RETURN_KIND, layer, relay, back),
        add_up(relay[collected], DELIVER_KIND, layer, home, delivered),
    ]


def _relays(parcels: _Parcels, ways: Ways) -> tuple[np.ndarray, np.ndarray]:
    """The relay on the home's node and the one on the slots' node, of every parcel."""
    ends = list(zip(parcels.home.tolist(), parcels.node.tolist(), strict=True))
    relay = np.array([ways.relay_of(home) for home, _ in ends], dtype=np.int64)
    return relay, np.array([ways.peer_of(home, node) for home, node in ends], dtype=np.int64)


def _within(parcels: _Parcels, layer: int, table: LayerTable, row: RowBytes, ways: Ways) -> list[np.ndarray]:
    """From the relay on the slots' node to their ranks, and back."""
    _, peers = _relays(parcels, ways)
    peer, rank, rows = peers[parcels.part_of], parcels.part_rank, parcels.part_rows
    headers = np.array([fan_out_header(table.slots_on(r)) for r in range(table.n_ranks)], dtype=np.int64)
    away = peer != rank
    out = np.where(away, headers[rank] + rows * row.sent, 0)
    back = np.where(away, rows * row.answered, 0)
    return [
        add_up(peer, DISPATCH_KIND, layer, rank, np.stack([rows, out])),
        add_up(rank, ANSWER_KIND, layer, peer, np.stack([rows, back])),
    ]
