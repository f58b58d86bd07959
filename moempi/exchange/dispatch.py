"""Dispatch and combine, side by side: what one sends out is what the other needs back."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moempi.device import cpu_rows
from moempi.exchange.engine import Engine
from moempi.exchange.plan import DispatchPlan, cut_into_pieces, plan_dispatch
from moempi.exchange.relay import Relay
from moempi.exchange.relay_plan import Parcel
from moempi.exchange.slots import LayerTable
from moempi.exchange.tasks import Future
from moempi.model.expert import tree_sum
from moempi.model.gate import Route
from moempi.stages import PACK


@dataclass(frozen=True)
class Rows:
    """The answers of one dispatch, in sending order, and how to find a pair's among them."""

    plan: DispatchPlan
    table: LayerTable
    answers: Tensor  # [R, D]
    dtype: torch.dtype  # of the model
    back: Future  # done when all answers are there
    fast: bool = False  # other nodes bring sums
    # By (node, piece): tokens [R] of this dispatch, and the float32 sums [R, D] of their experts there.
    sums: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def take(self, parcel: Parcel, rows: Tensor) -> None:
        """Keep what a parcel brings: the answers [P, D] of its pairs, or in fast mode sums [R, D] of its tokens."""
        if self.fast:
            self.sums[parcel.node, parcel.piece] = torch.from_numpy(parcel.tokens), rows.clone()
        else:
            self.answers[torch.from_numpy(parcel.places)] = rows

    def by_pair(self) -> tuple[Tensor, Tensor]:
        """Outputs [T * K, D] of experts in the model's dtype, and which of them is that of every pair [T * K]."""
        if not self.table.cut:
            return self.answers, torch.from_numpy(self.plan.places())
        pairs = self.answers.new_empty(self.plan.n_pairs, self.answers.shape[1], dtype=self.dtype)
        for slots in self.table.covers:
            lo, hi = self._range(slots[0])
            if hi > lo:
                pairs[torch.from_numpy(self.plan.pairs[lo:hi])] = self._whole(slots).to(self.dtype)
        return pairs, torch.arange(len(pairs))

    def _range(self, slot: int) -> tuple[int, int]:
        return int(self.plan.slot_begin[slot]), int(self.plan.slot_begin[slot + 1])

    def _whole(self, slots: tuple[int, ...]) -> Tensor:
        """The sum of a cover's parts, in the order of the tree over all leaves."""
        parts = {(int(self.table.lo[s]), int(self.table.hi[s])): self.answers[slice(*self._range(s))] for s in slots}
        return tree_sum(lambda lo, hi: parts.get((lo, hi)), 0, int(self.table.hi[slots[-1]]))


def dispatch(
    engine: Engine,
    relay: Relay | None,
    layer: int,
    microbatch: int,
    hidden: Tensor,
    route: Route,
    covers: np.ndarray,
    most_rows: int,
) -> Rows:
    """Send every row to the slots of its covers; the answers are there when `Rows.back` is done.

    Args:
        relay: takes what goes to other nodes; None: everything goes straight to its rank.
        hidden: [T, D] normalised rows, in the model's dtype.
        covers: [T, K].
        most_rows: rows of a message, above which it is sent in pieces.
    """
    table = engine.tables[layer]
    plan = plan_dispatch(covers, table)
    near, parcels = (list(plan.messages), []) if relay is None else relay.split(plan, table)
    messages = [piece for message in near for piece in cut_into_pieces(message, most_rows)]
    fast = relay is not None and relay.fast
    # In fast mode the answers of other nodes never come, and what stands in their place adds nothing.
    reserve = torch.zeros if fast else torch.empty
    answers = reserve(len(plan.pairs), hidden.shape[1], dtype=engine.answer_dtype(table))
    rows = Rows(plan, table, answers, engine.dtype, Future(len(messages) + len(parcels)), fast)
    first, end = (near[0].lo, near[-1].hi) if near else (0, 0)
    packed = hidden.index_select(0, torch.from_numpy(plan.pairs[first:end] // covers.shape[1]))  # [R, D]
    engine.recorder.lap(PACK, layer, engine.recorder.dispatching, len(plan.pairs))
    if relay is not None:
        weights = route.weights.numpy().ravel()[plan.pairs]
        for parcel in parcels:
            relay.send(parcel, layer, microbatch, hidden, weights, rows.take, rows.back)
    for m in messages:
        engine.send(m, layer, microbatch, packed[m.lo - first : m.hi - first], answers[m.lo : m.hi], rows.back)
    return rows


def combine(x: Tensor, route: Route, rows: Rows) -> Tensor:
    """Residual x [T, D] plus the weighted outputs of each token's experts: k ascending, float32, rounded once.

    In fast mode the sums of other nodes come first, by node.
    """
    answers, places = rows.by_pair()
    if not rows.sums:
        return cpu_rows.combine(x, route.weights, answers, places)
    total = x.to(torch.float32, copy=True)
    for _, (tokens, sums) in sorted(rows.sums.items()):
        total[tokens] += sums
    return cpu_rows.combine(total, route.weights, answers.float(), places).to(x.dtype)
