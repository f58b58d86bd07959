"""Dispatch and combine on a GPU, side by side: the same plan as on the CPU, its counts made where the routes are.

The host learns how many rows go to each slot, and nothing else of the routes: one copy per layer and microbatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moempi.device import cuda_rows
from moempi.device.cuda_memory import Rows
from moempi.exchange.engine_cuda import CudaEngine
from moempi.exchange.plan import cut_into_pieces, header_places, plan_messages
from moempi.exchange.slots import LayerTable
from moempi.exchange.tasks import Future
from moempi.model.expert import tree_sum
from moempi.model.gate import Route
from moempi.stages import NO_STEP, PACK, StepKey


@dataclass(frozen=True)
class CudaTable:
    """What a GPU needs of a layer's routing table, and what the host makes of its counts."""

    table: LayerTable
    cover_of: Tensor  # [E, most replicas] int32, on the GPU
    n_replicas: Tensor  # [E] int32, on the GPU
    cover_of_slot: np.ndarray  # [S]
    headers: Tensor  # [covers, 3] int32, on the GPU, as of `cuda_rows.Headers`; where no expert is cut
    header_rows: int  # that a header takes among packed rows; 0 where there are none


def on_gpu(tables: Mapping[int, LayerTable], device: torch.device, header_rows: int = 0) -> dict[int, CudaTable]:
    """The tables of all layers.

    Args:
        header_rows: that the header of a frame takes among packed rows; 0 where there are none.
    """
    return {layer: _on_gpu(table, device, header_rows) for layer, table in tables.items()}


def _on_gpu(table: LayerTable, device: torch.device, header_rows: int) -> CudaTable:
    cover_of_slot = np.zeros(len(table.rank), dtype=np.int64)
    for cover, slots in enumerate(table.covers):
        cover_of_slot[list(slots)] = cover
    return CudaTable(
        table,
        torch.from_numpy(table.cover_of.astype(np.int32)).to(device),
        torch.from_numpy(table.n_replicas.astype(np.int32)).to(device),
        cover_of_slot,
        torch.from_numpy(header_places(table, header_rows)).to(device),
        header_rows,
    )


class CudaRows(NamedTuple):
    """The answers of one dispatch and how to find a pair's among them."""

    table: LayerTable
    answers: Rows  # [R, D] by slot
    places: Tensor  # [T, K] int32, place of every pair among those sorted by cover
    slot_begin: np.ndarray  # [S + 1]
    block: int
    dtype: torch.dtype  # of the model

    def by_cover(self) -> Tensor:
        """[T * K, D]: the output of the expert of every pair, sorted by cover; in the model's dtype."""
        answers = self.answers.tensor()
        if not self.table.cut:
            return answers
        whole, begin = torch.empty(self.places.numel(), answers.shape[1], dtype=self.dtype, device=answers.device), 0
        for slots in self.table.covers:
            part = self._whole(answers, slots)
            whole[begin : begin + len(part)] = part
            begin += len(part)
        return whole

    def _whole(self, answers: Tensor, slots: tuple[int, ...]) -> Tensor:
        """The sum of a cover's parts, in the order of the tree over all leaves."""
        begin = self.slot_begin
        parts = {
            (int(self.table.lo[s]), int(self.table.hi[s])): answers[int(begin[s]) : int(begin[s + 1])] for s in slots
        }
        return tree_sum(lambda lo, hi: parts.get((lo, hi)), 0, int(self.table.hi[slots[-1]]))


class Sent(NamedTuple):
    """A dispatch under way."""

    counts: np.ndarray  # [covers] pairs
    rows: int
    back: Future  # done when all answers are there


async def dispatch(
    engine: CudaEngine,
    on_gpu: CudaTable,
    microbatch: int,
    hidden: Tensor,
    route: Route,
    turns: Tensor,
    most_rows: int,
    key: StepKey = NO_STEP,
) -> tuple[CudaRows, Sent]:
    """Send every row to the slots of its covers.

    Args:
        hidden: [T, D] normalised rows, in the model's dtype.
        route: [T, K], experts int32.
        turns: [T] int64, sequence + position of every token.
        most_rows: rows of a message, above which it is sent in pieces.
        key: of the step, for the trace.
    """
    table = on_gpu.table
    # The kernel writes the counts into memory of the host: there is nothing to copy.
    landing = engine.counts(microbatch, len(table.covers))
    replicas = on_gpu.cover_of, on_gpu.n_replicas
    places = torch.empty_like(route.experts)
    tokens = torch.empty_like(route.experts).view(-1) if table.cut else None
    cuda_rows.sort_pairs(route.experts, turns, *replicas, table.layer, landing, places, tokens=tokens)
    if tokens is None:
        # The number of rows is known: they are packed before the host knows where they go.
        rows, answers, block = await _reserve(engine, places.numel(), hidden.shape[1], table)
        cuda_rows.scatter(hidden, places, rows.address)
    counts = await engine.counted(microbatch, len(table.covers))
    if tokens is not None:
        by_slot = _by_slot(tokens, counts, on_gpu)
        rows, answers, block = await _reserve(engine, by_slot.shape[0], hidden.shape[1], table)
        cuda_rows.gather(hidden, by_slot, rows.address)
        await engine.mark()
    slot_counts = counts[on_gpu.cover_of_slot] if table.cut else counts
    back = send(engine, table, microbatch, slot_counts, rows, answers, most_rows, key)
    slot_begin = np.concatenate([[0], slot_counts.cumsum()])
    return CudaRows(table, answers, places, slot_begin, block, engine.dtype), Sent(counts, len(rows), back)


def send(
    engine: CudaEngine,
    table: LayerTable,
    microbatch: int,
    slot_counts: np.ndarray,
    rows: Rows,
    answers: Rows,
    most_rows: int,
    key: StepKey,
    header_rows: int = 0,
) -> Future:
    """Send rows that are packed, slot behind slot, to their ranks; the answers are there when the future is done.

    Args:
        header_rows: that lie ahead of the rows of each rank and end with their header; 0 where none has been written.
    """
    planned = plan_messages(slot_counts, table, header_rows)
    messages = planned if header_rows else [p for message in planned for p in cut_into_pieces(message, most_rows)]
    back = Future(sum(map(engine.notifications, messages)))
    engine.recorder.dispatching = key
    engine.recorder.lap(PACK, table.layer, key, sum(message.hi - message.lo for message in planned))
    for m in sorted(messages, key=lambda m: m.destination == engine.rank):  # what travels goes first
        part = rows.part(m.lo, m.hi), answers.part(m.lo, m.hi)
        engine.send(m, table.layer, microbatch, *part, back, framed=header_rows > 0)
    return back


async def _reserve(engine: CudaEngine, n: int, d: int, table: LayerTable) -> tuple[Rows, Rows, int]:
    """Room for n rows and their answers, in one block: who waits for room holds none."""
    block, rows, answers = await engine.room(n, d, (engine.dtype, engine.answer_dtype(table)))
    return rows, answers, block


def _by_slot(tokens: Tensor, counts: np.ndarray, on_gpu: CudaTable) -> Tensor:
    """The tokens of pairs by slot, from those by cover: every slot of a cover gets all of its pairs."""
    begin = np.concatenate([[0], np.cumsum(counts)])
    return torch.cat([tokens[int(begin[c]) : int(begin[c + 1])] for c in on_gpu.cover_of_slot])


def combine(engine: CudaEngine, x: Tensor, route: Route, rows: CudaRows, out: Tensor | None = None) -> Tensor:
    """Residual x [T, D] plus the weighted outputs of each token's experts: k ascending, float32, rounded once.

    Args:
        out: [T, D] for what comes out.
    """
    combined = cuda_rows.combine(x, rows.by_cover(), rows.places, route.weights, out)
    engine.give(rows.block)
    return combined
