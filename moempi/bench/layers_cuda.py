"""A stack of MoE layers on a GPU, beside its experts alone: the twin of `layers`."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from moempi.bench.layers import (
    STALL,
    channels,
    most_rows_here,
    plan,
    quiet_recorder,
    rows_of_slots,
    scores_of,
)
from moempi.bench.stack import Stack
from moempi.device import cuda_rows
from moempi.device.cuda import Cuda
from moempi.device.cuda_experts import Scratch
from moempi.device.cuda_experts import Stack as ExpertStack
from moempi.device.cuda_memory import MessageMemory, Rows, block_bytes
from moempi.exchange.arrivals import Arrival
from moempi.exchange.arrivals_cuda import CudaExperts
from moempi.exchange.dispatch_cuda import combine, dispatch, on_gpu
from moempi.exchange.engine import Limits
from moempi.exchange.engine_cuda import CudaEngine
from moempi.exchange.host_memory import HostMemory
from moempi.exchange.tasks import Future
from moempi.exchange.topology import Topology
from moempi.prepare import DTYPES
from moempi.stages import COMBINE, PREFILL, STEP


class CudaLayers:
    """The stack on a GPU. Collective.

    Args:
        tokens: T of every microbatch.
        passes: times that each microbatch goes through all layers in a round.
        staged: rows pass through pinned memory of the host.
    """

    measured: tuple[str, ...] = ("stack", "pure", "ceiling")

    def __init__(self, topology: Topology, device: Cuda, stack: Stack, tokens: int, passes: int, *, staged: bool):
        self.world, self.shape, self.passes, self.device = topology.world, stack, passes, device.device
        self.dtype = DTYPES[stack.dtype]
        tables, tags, self.most_rows = plan(stack, self.world.size, tokens)
        random = torch.Generator(self.device).manual_seed(self.world.rank)
        held = {layer: table.slots_on(self.world.rank) for layer, table in tables.items()}
        scratch = Scratch()
        self.layers = {layer: self._experts(random, n, scratch) for layer, n in held.items() if n}
        self.tables = on_gpu(tables, self.device)
        self.x = [self._draw(random, tokens, stack.d_model) for _ in range(stack.microbatches)]
        scores = [scores_of(random, tokens, stack) for _ in self.x]
        self.routes = [device.choose_experts(each, stack.top_k, True) for each in scores]
        self.turns = torch.arange(tokens, device=self.device)
        sent = {layer: [self._sorted(layer, m)[1] for m in range(len(self.x))] for layer in self.tables}
        counts = {layer: [each.cpu().numpy() for each in of_layer] for layer, of_layer in sent.items()}
        self.rows_here = rows_of_slots(self.world, tables, counts)
        most = most_rows_here(self.rows_here)
        self.memory = MessageMemory(self.device, *self._sizes(tokens * stack.top_k, most))
        self.engine = CudaEngine(
            channels(self.world),
            tables,
            CudaExperts(self.layers, self.memory.memory.view(self.dtype)),
            self.dtype,
            stack.d_model,
            tags,
            Limits(self.memory.arrivals.end, STALL, 1.0),
            quiet_recorder(self.world, stack),
            payload=self.world.Dup(),
            memory=self.memory,
            host=HostMemory(self.world, self.memory.memory.nbytes) if staged else None,
        )
        # For what sends nothing: rows that came and their answers; rows that are sent, and what a combine reads.
        self.apart = self._draw(random, 2 * most, stack.d_model)
        self.alone = CudaExperts(self.layers, self.apart.view(-1))
        self.packed, self.answers = (self._draw(random, tokens * stack.top_k, stack.d_model) for _ in range(2))

    def _sizes(self, sent: int, most: int) -> tuple[int, int]:
        """Bytes for the rows that homes send and await, and for those that arrive with their answers."""
        row, m = self.shape.d_model * self.dtype.itemsize, self.shape.microbatches
        pieces = 2 * (self.world.size - 1) * m * block_bytes([1, 1])
        return m * block_bytes([sent * row, sent * row]), m * block_bytes([most * row, most * row]) + pieces

    def _draw(self, random: torch.Generator, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random, device=self.device, dtype=torch.float32) / 8).to(self.dtype)

    def _experts(self, random: torch.Generator, n: int, scratch: Scratch) -> ExpertStack:
        d, hidden = self.shape.d_model, self.shape.hidden
        gate_up, down = self._draw(random, n, 2 * hidden, d) / 8, self._draw(random, n, d, hidden) / 8
        return ExpertStack(gate_up, down, exact=self.shape.mode == "exact", scratch=scratch)

    def _sorted(self, layer: int, m: int) -> tuple[Tensor, Tensor]:
        """Where pairs are by cover, and how many there are of each."""
        table = self.tables[layer]
        counts = torch.empty(len(table.table.covers), dtype=torch.int64, device=self.device)
        replicas = table.cover_of, table.n_replicas
        experts = self.routes[m].experts
        places = torch.empty_like(experts)
        cuda_rows.sort_pairs(experts, self.turns, *replicas, layer, counts, places)
        return places, counts

    # ------------------------------------------------------------ what is timed

    def stack(self) -> None:
        """As a run does it."""
        self.engine.run([self._take(m) for m in range(len(self.x))])

    async def _take(self, m: int) -> None:
        route, recorder = self.routes[m], self.engine.recorder
        for number in range(self.passes):
            x, key, begun = self.x[m], (m, number, PREFILL), recorder.since
            for layer, table in self.tables.items():
                rows, sent = await dispatch(self.engine, table, m, x, route, self.turns, self.most_rows, key)
                recorder.routed(layer, table.table.load(sent.counts))
                begin = recorder.since
                await sent.back
                recorder.waited(layer, key, begin, sent.back.at, sent.rows, sent.back.by)
                x = combine(self.engine, x, route, rows)
                recorder.lap(COMBINE, layer, key, len(x))
            recorder.span(STEP, -1, key, begun, recorder.since, len(x), 0, -1)

    def pure(self) -> None:
        """This rank's experts on the rows that they get, and nothing else."""
        with torch.cuda.stream(self.engine.low):  # small calls are recorded, which the default stream does not allow
            for layer, m in self._calls():
                self._compute(layer, m)

    def ceiling(self) -> None:
        """Pack, experts and combine on the engine's two streams, nothing sent."""
        high, low = self.engine.high, self.engine.low
        for layer, m in self._calls():
            with torch.cuda.stream(high):
                places, _ = self._sorted(layer, m)
                cuda_rows.scatter(self.x[m], places, self.packed.data_ptr())
            with torch.cuda.stream(low):
                low.wait_stream(high)
                self._compute(layer, m)
            with torch.cuda.stream(high):
                cuda_rows.combine(self.x[m], self.answers, places, self.routes[m].weights)

    def _calls(self) -> list[tuple[int, int]]:
        return [(layer, m) for _ in range(self.passes) for layer in self.tables for m in range(len(self.x))]

    def _compute(self, layer: int, m: int) -> None:
        """What every slot of this rank gets of a microbatch, from all ranks, as arrivals that are all there."""
        counts = self.rows_here[layer][m]
        n = sum(counts)
        if n:
            rows, answers = Rows.of(self.apart).part(0, n), Rows.of(self.apart).part(n, 2 * n)
            self.alone.add(Arrival(self.world.rank, 0, layer, m, rows, answers, counts, n, Future()))
            while self.alone:
                self.alone.serve(0)

    def settle(self) -> None:
        """Until the GPU has done what it was given."""
        torch.cuda.synchronize()

    def free(self) -> None:
        """Give the communicators and the GPU's memory back. Collective."""
        self.engine.free()
        for name in ("memory", "engine", "alone", "apart", "packed", "answers", "layers", "x", "routes"):
            delattr(self, name)
        gc.collect()  # the engine is part of a circle: it knows what is looked at in a turn
        torch.cuda.empty_cache()
