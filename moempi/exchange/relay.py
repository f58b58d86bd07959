"""The engine's side of the relayed routes: a home gives parcels to its relay, a rank with slots takes fan-outs.

    home -> its node's relay -> a relay on the slots' node -> ranks of the slots, and the same way back

On a relay `Forwarder` is what serves its homes, `FanOut` what serves the slots of its node. Why none of it can
wait in a circle is told in docs/decisions/0005-relays.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moempi.exchange.arrivals import Arrival
from moempi.exchange.engine import Engine
from moempi.exchange.fan_out import FanOut
from moempi.exchange.forwarder import Done, Forwarder
from moempi.exchange.hops import Hops, Sizes, TagCounter
from moempi.exchange.inbox import Inbox, Received
from moempi.exchange.plan import DispatchPlan, Message
from moempi.exchange.relay_plan import Parcel, Ways, pack_parcels, parcel_rows, split_by_node
from moempi.exchange.relay_wire import Name, read_fan_out, read_parcels, return_rows, write_parcel
from moempi.exchange.slots import LayerTable
from moempi.exchange.tasks import Future
from moempi.exchange.wire import as_bytes
from moempi.stages import COLLECT_KIND, DELIVER_KIND, DISPATCH_KIND


@dataclass(frozen=True)
class Sent:
    """A parcel on its way, at its home."""

    name: Name
    parcel: Parcel
    take: Callable[[Parcel, Tensor], None]  # stores the rows that come back
    back: Future


class Relay:
    """What a rank does in a relayed route; one of the takers of its engine.

    Args:
        hops: the communicators of the route.
    """

    def __init__(self, engine: Engine, ways: Ways, hops: Hops, sizes: Sizes) -> None:
        self._engine, self._ways, self._hops, self._sizes = engine, ways, hops, sizes
        self._tags = TagCounter()
        self._fan_outs = Inbox(hops.fan_out, engine.arrivals, self._weigh, engine.requests, self._arrived)
        self._forwarder: Forwarder | None = None
        self._fan_out: FanOut | None = None
        if hops.onward is not None and hops.returns is not None:
            self._forwarder = Forwarder(engine, ways, hops, hops.onward, hops.returns, sizes)
            self._fan_out = FanOut(engine, hops, hops.onward, hops.returns, sizes)

    @property
    def fast(self) -> bool:
        """Whether the answers of another node come back as one weighted sum for each token."""
        return self._sizes.any_row.fast

    def __call__(self) -> bool:
        """Take what has come for relay and slots; whether anything had."""
        moved = self._fan_outs.poll()
        for part in (self._forwarder, self._fan_out):
            moved = (part is not None and part.poll()) or moved
        return moved

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self._hops.free()

    # ------------------------------------------------------------ the home's side

    def split(self, plan: DispatchPlan, table: LayerTable) -> tuple[list[Message], list[Parcel]]:
        """What a dispatch sends straight to ranks of its node, and what goes to other nodes."""
        near, far = split_by_node(plan, self._engine.rank, self._ways.nodes)
        top_k = self._sizes.top_k
        most_rows = parcel_rows(self._sizes.piece_rows, table, top_k)
        return near, list(pack_parcels(plan, table, top_k, far, most_rows))

    def send(
        self,
        parcel: Parcel,
        layer: int,
        microbatch: int,
        hidden: Tensor,
        weights: np.ndarray,
        take: Callable[[Parcel, Tensor], None],
        back: Future,
    ) -> None:
        """Send a parcel on its way.

        Args:
            hidden: [T, D] rows of the microbatch.
            weights: float32 [T * K] of every pair of the dispatch plan, in its order.
            take: given what comes back: a row for every pair [P, D], or in fast mode sums for every token [R, D].
            back: notified when it has.
        """
        engine, sizes = self._engine, self._sizes
        name = Name(engine.rank, layer, microbatch, parcel.piece, parcel.node)
        sent = Sent(name, parcel, take, back)
        rows = as_bytes(hidden.index_select(0, torch.from_numpy(parcel.tokens)))
        own = weights[parcel.places] if self.fast else None
        frame = write_parcel(name, parcel.slots, parcel.counts, parcel.row_of_pair, own, rows, sizes.rows[layer])
        relay = self._ways.relay_of(engine.rank)
        peer, way = self._describe(relay, parcel, layer)
        engine.expect(name, layer, microbatch, peer, len(parcel.places), way)
        if self._forwarder is not None:
            ((parsed, raw),) = read_parcels(frame, sizes.any_row)
            self._forwarder.put(parsed, raw, partial(self._bring, sent), lambda: None)
        else:
            self._send_to_relay(relay, sent, frame)

    def _send_to_relay(self, relay: int, sent: Sent, frame: np.ndarray) -> None:
        """To the leader; the receive for what comes back is posted first."""
        engine, hops, layer = self._engine, self._hops, sent.name.layer
        tag, place = self._tags.next(relay), hops.collect.place(relay)
        n = return_rows(len(sent.parcel.tokens), len(sent.parcel.places), self._sizes.rows[layer])
        reserved = np.empty(n * self._sizes.returned_width(layer), dtype=np.uint8)
        request = hops.deliver.comm.Irecv(reserved, place, tag)
        engine.requests.add(request, lambda: self._delivered(sent, reserved, n, relay))
        engine.requests.add(hops.collect.comm.Isend(frame, place, tag), lambda: frame, to=relay)
        engine.recorder.sent(COLLECT_KIND, layer, relay, len(sent.parcel.tokens), frame.nbytes)

    def _delivered(self, sent: Sent, rows: np.ndarray, n: int, relay: int) -> None:
        self._engine.recorder.received(DELIVER_KIND, sent.name.layer, relay, n, rows.nbytes)
        self._bring(sent, rows, lambda: None)

    def _bring(self, sent: Sent, rows: np.ndarray, done: Done) -> None:
        kind = torch.float32 if self.fast else self._engine.answer_dtype(self._engine.tables[sent.name.layer])
        sent.take(sent.parcel, torch.from_numpy(rows).view(kind).view(-1, self._engine.d_model))
        self._engine.answered(sent.name, sent.back)
        done()

    def _describe(self, relay: int, parcel: Parcel, layer: int) -> tuple[int, str]:
        """For the report of a stall: the first other rank that the rows pass, and the way beyond it."""
        peer = self._ways.peer_of(self._engine.rank, parcel.node)
        slots = f"slots on {', '.join(map(str, parcel.ranks(self._engine.tables[layer])))}"
        if relay == self._engine.rank:
            return peer, f", relay of {slots}"
        return relay, f", by way of rank {peer}, relay of {slots}"

    # ------------------------------------------------------------ the slots' side

    def _weigh(self, nbytes: int) -> int:
        """Rows and their answers, at most: which layer they are of is not known yet."""
        row = self._sizes.any_row.sent
        return nbytes + nbytes // row * max(each.answered for each in self._sizes.rows.values())

    def _arrived(self, message: Received) -> None:
        engine = self._engine
        layer, microbatch, counts, body = read_fan_out(message.buffer)
        rows = torch.from_numpy(body).view(engine.dtype).view(-1, engine.d_model)
        answer = torch.empty(rows.shape, dtype=engine.answer_dtype(engine.tables[layer]))
        engine.recorder.received(DISPATCH_KIND, layer, message.source, len(rows), message.buffer.nbytes)
        group = self._hops.answers
        reply = partial(group.comm.Isend, dest=group.place(message.source), tag=message.tag)
        engine.experts.add(
            Arrival(
                source=message.source,
                tag=message.tag,
                layer=layer,
                microbatch=microbatch,
                rows=rows,
                answer=answer,
                rows_per_slot=counts,
                left=len(rows),
                charged=message.charged,
                reply=reply,
            )
        )
