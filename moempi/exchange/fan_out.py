"""The relay of the slots: spreads the parcels of other nodes over the ranks of its own, and sends back the answers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moempi.exchange.account import Account
from moempi.exchange.arrivals import Arrival
from moempi.exchange.engine import Engine
from moempi.exchange.hops import Hops, Sizes, TagCounter
from moempi.exchange.inbox import Inbox, Received
from moempi.exchange.lane import Group, Lanes, Parcelled
from moempi.exchange.relay_wire import Frame, Name, empty_return, read_parcels, return_bytes, write_fan_out
from moempi.exchange.tasks import Future
from moempi.exchange.wire import as_bytes
from moempi.stages import DISPATCH_KIND, NO_STEP, RELAY_KIND, RETURN_KIND


@dataclass
class _Message:
    """Parcels that came in one message: what it holds is given back when all are spread."""

    charged: int
    left: int


@dataclass(frozen=True)
class _Spread:
    """A parcel whose rows have gone to their slots; nothing of the message that it came in is kept."""

    source: int  # the relay that it came from
    layer: int
    n_rows: int  # R
    row_of_pair: Tensor  # [P]
    weights: Tensor | None  # [P] in fast mode
    answers: Tensor  # [P, D] filled by the slots
    reply: np.ndarray  # the return, uint8
    body: np.ndarray  # its rows, uint8; but in fast mode `answers` is a view of them
    charged: int


class FanOut:
    """Two budgets: of parcels that have come, and of rows and answers of those that are spread.

    A parcel waits for room in the second; one that is spread waits for its slots, which answer into memory reserved
    here, and for its return to be received.
    """

    def __init__(self, engine: Engine, hops: Hops, onward: Group, returns: Group, sizes: Sizes) -> None:
        self._engine, self._hops, self._sizes = engine, hops, sizes
        self._came, self._held = Account(sizes.budget), Account(sizes.budget)
        self._inbox = Inbox(onward, self._came, lambda n: n, engine.requests, self._arrived)
        self._lanes = Lanes(returns, RETURN_KIND, sizes.most_bytes, engine.requests, engine.recorder)
        self._waiting: deque[tuple[int, Frame, _Message]] = deque()
        self._tags = TagCounter()

    def poll(self) -> bool:
        """Take parcels that have come and spread those that there is room for; whether there were any."""
        moved = self._inbox.poll()
        while self._waiting and self._held.take(charged := self._weigh(self._waiting[0][1])):
            source, frame, message = self._waiting.popleft()
            self._fan_out(source, frame, charged)
            message.left -= 1
            if not message.left:
                self._came.give(message.charged)
            moved = True
        return moved

    def _arrived(self, received: Received) -> None:
        found = list(read_parcels(received.buffer, self._sizes.any_row))
        message = _Message(received.charged, len(found))
        for number, (frame, raw) in enumerate(found):
            layer, count = frame.name.layer, 0 if number else 1
            self._engine.recorder.received(RELAY_KIND, layer, received.source, frame.n_rows, raw.nbytes, count)
            self._waiting.append((received.source, frame, message))

    def _weigh(self, frame: Frame) -> int:
        """Rows for the slots, their answers, the return, and its copy in a message of several."""
        row, pairs = self._sizes.rows[frame.name.layer], len(frame.row_of_pair)
        back = return_bytes(frame.n_rows, pairs, row)
        return pairs * row.sent + (pairs * row.answered if row.fast else 0) + 2 * back

    # ------------------------------------------------------------ out to the slots

    def _fan_out(self, source: int, frame: Frame, charged: int) -> None:
        engine, layer = self._engine, frame.name.layer
        row = self._sizes.rows[layer]
        rows = torch.from_numpy(frame.rows).view(engine.dtype).view(frame.n_rows, engine.d_model)
        row_of_pair = torch.from_numpy(frame.row_of_pair).long()  # [P] a copy
        weights = None if frame.weights is None else torch.from_numpy(frame.weights).clone()
        pairs = rows[row_of_pair]  # [P, D]
        kind = engine.answer_dtype(engine.tables[layer])
        reply, body = empty_return(frame.name, frame.n_rows if row.fast else len(pairs), row)
        place = np.empty(len(pairs) * row.answered, dtype=np.uint8) if row.fast else body
        answers = torch.from_numpy(place).view(kind).view(len(pairs), engine.d_model)
        parts = list(self._parts(frame))
        spread = _Spread(source, layer, frame.n_rows, row_of_pair, weights, answers, reply, body, charged)
        back = Future(len(parts), then=partial(self._send_back, spread))
        for rank, counts, lo, hi in parts:
            self._send(frame.name, rank, counts, pairs[lo:hi], answers[lo:hi], back)

    def _parts(self, frame: Frame) -> list[tuple[int, np.ndarray, int, int]]:
        """(rank, rows for each of its slots, lo, hi): pairs [lo, hi) go to a rank."""
        table = self._engine.tables[frame.name.layer]
        ranks, numbers = table.rank[frame.slots], table.number[frame.slots]
        parts, lo = [], 0
        for rank in np.unique(ranks).tolist():
            counts = np.zeros(table.slots_on(rank), dtype=np.int64)
            counts[numbers[ranks == rank]] = frame.counts[ranks == rank]
            hi = lo + int(counts.sum())
            parts.append((rank, counts, lo, hi))
            lo = hi
        return parts

    def _send(self, name: Name, rank: int, counts: np.ndarray, rows: Tensor, answers: Tensor, back: Future) -> None:
        engine, n = self._engine, len(rows)
        if rank == engine.rank:
            per_slot = tuple(counts.tolist())
            arrival = Arrival(rank, -1, name.layer, name.microbatch, rows, answers, per_slot, n, done=back)
            engine.experts.add(arrival)
            engine.recorder.sent(DISPATCH_KIND, name.layer, rank, n, 0)
            return
        tag = self._tags.next(rank)
        place, key = self._hops.fan_out.place(rank), ("fan-out", rank, tag)
        engine.expect(key, name.layer, name.microbatch, rank, n, f", relayed for rank {name.home}")
        receive = self._hops.answers.comm.Irecv(as_bytes(answers), place, tag)
        engine.requests.add(receive, lambda: engine.take_answer(key, answers, name.layer, back))
        engine.recorder.dispatching = NO_STEP
        payload = write_fan_out(name.layer, name.microbatch, counts, as_bytes(rows))
        engine.requests.add(self._hops.fan_out.comm.Isend(payload, place, tag), lambda: payload, to=rank)
        engine.recorder.sent(DISPATCH_KIND, name.layer, rank, n, payload.nbytes)

    # ------------------------------------------------------------ and back

    def _send_back(self, spread: _Spread) -> None:
        n = len(spread.answers)
        if spread.weights is not None:
            n = spread.n_rows
            sums = torch.zeros(n, self._engine.d_model)
            weighted = spread.answers * spread.weights.unsqueeze(1)  # [P, D] float32
            sums.index_add_(0, spread.row_of_pair, weighted)
            spread.body[:] = as_bytes(sums)
        gone = partial(self._held.give, spread.charged)
        self._lanes.to(spread.source).put(Parcelled(spread.reply, spread.layer, n, gone))
