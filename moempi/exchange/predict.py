"""What a run must have sent, computed from the routes in its trace: pure integers, no MPI.

Counts are deterministic once the routes are known, with the home, step and microbatch of every token: replicas are
chosen by a rule, not by queues. So rows, bytes and messages of a trace can be held against this, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moempi.exchange.plan import header_bytes
from moempi.exchange.slots import LayerTable, answer_itemsize
from moempi.stages import ANSWER_KIND, DISPATCH_KIND

# The columns of /traffic in a trace, in the order in which its rows are sorted; then what is counted.
LINK = ("source", "kind", "layer", "destination")
COUNTS = ("rows", "bytes", "messages")


@dataclass(frozen=True)
class RowSizes:
    """What a row weighs in a message.

    Args:
        d_model: D.
        itemsize: bytes of a number in the model's dtype.
        most_rows: rows of a message, above which it is sent in pieces.
    """

    d_model: int
    itemsize: int
    most_rows: int

    def dispatched(self) -> int:
        """Bytes of a row on its way to a slot."""
        return self.d_model * self.itemsize

    def answered(self, table: LayerTable) -> int:
        """Bytes of a row on its way back."""
        return self.d_model * answer_itemsize(table.cut, self.itemsize)


def messages_from_routes(
    routes: Mapping[str, np.ndarray], tables: Mapping[int, LayerTable], sizes: RowSizes
) -> dict[str, np.ndarray]:
    """Rows, bytes and messages of every link, as `/traffic` of the same run's trace has them.

    A home sends one message per (step, microbatch, layer) to every other rank that gets rows of it, in pieces where
    it is too large, and gets as many back. Rows that stay on their rank count, without messages or bytes.

    Args:
        routes: the columns rank, step, microbatch, layer, sequence, position int [T] and experts [T, K] of a trace of
            level "routes".
        tables: the routing table of every MoE layer.

    Returns:
        int64 columns source, kind, layer, destination, rows, bytes, messages; one row for every link and layer that
        carried anything, sorted by the first four.
    """
    links = [link for layer, table in sorted(tables.items()) for link in _of_layer(routes, layer, table, sizes)]
    return as_columns(links, COUNTS)


def as_columns(links: list[np.ndarray], counts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Links [M, 4 + C] as columns, sorted by the four that name a link."""
    table = np.concatenate([np.empty((0, len(LINK) + len(counts)), dtype=np.int64), *links])
    table = table[np.lexsort(table[:, len(LINK) - 1 :: -1].T)]
    return dict(zip((*LINK, *counts), table.T, strict=True))


def _of_layer(
    routes: Mapping[str, np.ndarray], layer: int, table: LayerTable, sizes: RowSizes
) -> tuple[np.ndarray, np.ndarray]:
    """Dispatches and answers of one layer: two arrays [links, 7]."""
    return direct_links(*rows_per_dispatch(*rows_of_layer(routes, layer, table), table), layer, table, sizes)


def direct_links(
    source: np.ndarray, destination: np.ndarray, rows: np.ndarray, layer: int, table: LayerTable, sizes: RowSizes
) -> tuple[np.ndarray, np.ndarray]:
    """What dispatches of `rows` [M] from ranks to ranks [M] come to, and their answers: two arrays [links, 7]."""
    away = source != destination
    messages = np.where(away, -(-rows // sizes.most_rows), 0)
    headers = np.array([header_bytes(table.slots_on(rank)) for rank in range(table.n_ranks)], dtype=np.int64)
    out = np.where(away, rows * sizes.dispatched(), 0) + messages * headers[destination]
    back = np.where(away, rows * sizes.answered(table), 0)
    return (
        add_up(source, DISPATCH_KIND, layer, destination, np.stack([rows, out, messages])),
        add_up(destination, ANSWER_KIND, layer, source, np.stack([rows, back, messages])),
    )


def rows_per_dispatch(
    homes: np.ndarray, token: np.ndarray, slot: np.ndarray, table: LayerTable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, destination, rows), int64 [M]: what each dispatch of a layer brings to each rank that it goes to.

    A dispatch is what one home sends in one (step, microbatch); it may go to its own rank too.

    Args:
        homes, token, slot: as of `rows_of_layer`, or some of its rows.
    """
    keys = np.concatenate([homes[:, token], table.rank[slot][None]])
    found, rows = np.unique(keys, axis=1, return_counts=True)
    return found[0], found[3], rows.astype(np.int64)


def rows_of_layer(
    routes: Mapping[str, np.ndarray], layer: int, table: LayerTable
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every row that a layer sends: (homes [3, T]: rank, step, microbatch of a token; token [R]; slot [R])."""
    mine = np.flatnonzero(routes["layer"] == layer)
    names = ("rank", "step", "microbatch", "sequence", "position")
    rank, step, microbatch, sequence, position = (routes[name][mine].astype(np.int64) for name in names)
    covers = table.choose_covers(routes["experts"][mine], sequence, position)  # [T, K]
    # One row for every slot of a cover: a cut expert's pieces all get the token.
    lengths = np.array([len(slots) for slots in table.covers], dtype=np.int64)
    begin = np.cumsum(lengths) - lengths
    slots = np.array([slot for cover in table.covers for slot in cover], dtype=np.int64)
    token, cover = np.repeat(np.arange(len(mine)), covers.shape[1]), covers.ravel()
    token, cover, part = _spread(token, cover, lengths[cover])
    return np.stack([rank, step, microbatch]), token, slots[begin[cover] + part]


def _spread(token: np.ndarray, cover: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every (token, cover) as often as the cover has slots, and which of them: three arrays [sum of `times`]."""
    ends = np.cumsum(times)
    part = np.arange(int(times.sum())) - np.repeat(ends - times, times)
    return np.repeat(token, times), np.repeat(cover, times), part


def add_up(source: np.ndarray, kind: int, layer: int, destination: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Totals of counts [C, M] by link: int64 [links, 4 + C]."""
    links, place = np.unique(np.stack([source, destination]), axis=1, return_inverse=True)
    totals = np.zeros((len(counts), links.shape[1]), dtype=np.int64)
    for total, count in zip(totals, counts, strict=True):
        np.add.at(total, place.ravel(), count)
    same = np.ones(links.shape[1], dtype=np.int64)
    return np.stack([links[0], kind * same, layer * same, links[1], *totals], axis=1)
