"""The relay of the homes: takes their parcels, sends them to other nodes, and brings home what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from moempi.exchange.account import Account
from moempi.exchange.engine import Engine
from moempi.exchange.hops import Hops, Sizes
from moempi.exchange.inbox import Inbox, Received
from moempi.exchange.lane import Group, Lanes, Parcelled
from moempi.exchange.relay_plan import Ways
from moempi.exchange.relay_wire import Frame, Name, read_parcels, read_returns
from moempi.stages import COLLECT_KIND, DELIVER_KIND, RELAY_KIND, RETURN_KIND

Done = Callable[[], None]
Bring = Callable[[np.ndarray, Done], None]  # takes the returned rows uint8, and what to call once they are home


def _home(_rows: np.ndarray, done: Done) -> None:
    """Rows are home: they were kept until here, now what they hold is given back."""
    done()


@dataclass
class _Batch:
    """Returns that came in one message: what it holds is given back when all are home."""

    left: int


class Forwarder:
    """Two budgets: of parcels collected from the node's homes, and of returns until they are delivered.

    A collected parcel waits for the other node's relay; a return waits for nothing but its home, which has posted
    the receive for it.
    """

    def __init__(self, engine: Engine, ways: Ways, hops: Hops, onward: Group, returns: Group, sizes: Sizes) -> None:
        self._engine, self._ways, self._hops, self._sizes = engine, ways, hops, sizes
        self._collected, self._returned = Account(sizes.budget), Account(sizes.budget)
        # The lane may copy a parcel into a larger message.
        self._parcels = Inbox(hops.collect, self._collected, lambda n: 2 * n, engine.requests, self._collect)
        self._returns = Inbox(returns, self._returned, lambda n: n, engine.requests, self._come_back)
        self._lanes = Lanes(onward, RELAY_KIND, sizes.most_bytes, engine.requests, engine.recorder)
        self._awaited: dict[Name, Bring] = {}

    def poll(self) -> bool:
        """Take what has come; whether anything had."""
        moved = self._returns.poll()
        return self._parcels.poll() or moved

    def put(self, frame: Frame, raw: np.ndarray, bring: Bring, gone: Done) -> None:
        """Send a parcel to the node of its slots.

        Args:
            raw: its bytes, uint8.
            bring: given what comes back.
            gone: called when its bytes have been sent.
        """
        name = frame.name
        self._awaited[name] = bring
        peer = self._ways.peer_of(name.home, name.node)
        self._lanes.to(peer).put(Parcelled(raw, name.layer, frame.n_rows, gone))

    # ------------------------------------------------------------ for other homes of the node

    def _collect(self, message: Received) -> None:
        ((frame, _),) = read_parcels(message.buffer, self._sizes.any_row)
        name, pairs = frame.name, len(frame.row_of_pair)
        self._engine.recorder.received(COLLECT_KIND, name.layer, name.home, frame.n_rows, message.buffer.nbytes)
        peer = self._ways.peer_of(name.home, name.node)
        self._engine.expect(name, name.layer, name.microbatch, peer, pairs, f", relayed for rank {name.home}")
        bring = partial(self._deliver, name, message.tag)
        self.put(frame, message.buffer, bring, partial(self._collected.give, message.charged))

    def _deliver(self, name: Name, tag: int, rows: np.ndarray, done: Done) -> None:
        engine, group = self._engine, self._hops.deliver
        engine.answered(name)
        request = group.comm.Isend(rows, group.place(name.home), tag)
        engine.requests.add(request, partial(_home, rows, done), to=name.home)
        count = rows.nbytes // self._sizes.returned_width(name.layer)
        engine.recorder.sent(DELIVER_KIND, name.layer, name.home, count, rows.nbytes)

    # ------------------------------------------------------------ what comes back

    def _come_back(self, message: Received) -> None:
        found = list(read_returns(message.buffer, self._sizes.returned_width))
        batch = _Batch(len(found))
        for number, one in enumerate(found):
            layer, count = one.name.layer, 0 if number else 1
            self._engine.recorder.received(RETURN_KIND, layer, message.source, one.n_rows, one.nbytes, count)
            self._awaited.pop(one.name)(one.rows, partial(self._one_home, batch, message.charged))

    def _one_home(self, batch: _Batch, charged: int) -> None:
        batch.left -= 1
        if not batch.left:
            self._returned.give(charged)
