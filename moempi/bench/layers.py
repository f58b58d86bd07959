"""A stack of MoE layers on the CPU, beside its experts alone: the twin of `layers_cuda`.

Microbatches go through the layers with the engine, messages and kernels of a run. The gate has chosen the routes
before the clock starts; attention is left out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from moempi.bench.stack import Stack
from moempi.device.cpu import Cpu
from moempi.exchange.arrivals import Arrival, Experts
from moempi.exchange.dispatch import combine, dispatch
from moempi.exchange.engine import SPIN, Channels, Engine, Limits
from moempi.exchange.plan import Tags, message_pieces
from moempi.exchange.slots import LayerTable, layer_tables
from moempi.exchange.tasks import Future
from moempi.exchange.topology import Topology
from moempi.job import PlacementOptions
from moempi.model.expert import Expert
from moempi.model.network import product_shapes
from moempi.planning.placement import place
from moempi.prepare import DTYPES
from moempi.recorder import Recorder
from moempi.stages import COMBINE, PREFILL, STEP
from moempi.tracing import TraceOf, Tracer

PIECE = 2**28  # most bytes of a message
STALL = 120.0  # s


class Layers(Protocol):
    """What is timed. Everything is collective."""

    measured: tuple[str, ...]  # names of methods without arguments, "stack" first

    def settle(self) -> None:
        """Until the device has done what it was given."""

    def free(self) -> None:
        """Give the communicators back."""


class CpuLayers:
    """The stack on the CPU. Collective.

    Args:
        tokens: T of every microbatch.
        passes: times that each microbatch goes through all layers in a round.
    """

    measured: tuple[str, ...] = ("stack", "pure")

    def __init__(self, topology: Topology, device: Cpu, stack: Stack, tokens: int, passes: int):
        self.world, self.shape, self.passes, self.device = topology.world, stack, passes, device
        self.dtype = DTYPES[stack.dtype]
        self.tables, self.tags, self.most_rows = plan(stack, self.world.size, tokens)
        device.choose_products(product_shapes(stack.config(), self.dtype, 1))
        random = torch.Generator().manual_seed(self.world.rank)
        slots = {
            (layer, number): self._expert(random)
            for layer, table in self.tables.items()
            for number in range(table.slots_on(self.world.rank))
        }
        self.x = [self._draw(random, tokens, stack.d_model) for _ in range(stack.microbatches)]
        scores = [scores_of(random, tokens, stack) for _ in self.x]
        self.routes = [device.choose_experts(each, stack.top_k, True) for each in scores]
        self.experts, self.alone, self.positions = Experts(slots), Experts(slots), np.arange(tokens)
        self.engine = Engine(
            channels(self.world),
            self.tables,
            self.experts,
            self.dtype,
            stack.d_model,
            self.tags,
            Limits(2**40, STALL, 0.002, SPIN if topology.cores >= device.threads else 0.0),
            quiet_recorder(self.world, stack),
        )
        counts = {layer: [self._covers(table, m) for m in range(len(self.x))] for layer, table in self.tables.items()}
        self.rows_here = rows_of_slots(self.world, self.tables, counts)
        self.rows = self._draw(random, most_rows_here(self.rows_here), stack.d_model)
        self.answers = torch.empty_like(self.rows)

    def _draw(self, random: torch.Generator, *shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random) / 8).to(self.dtype)

    def _expert(self, random: torch.Generator) -> Expert:
        d, hidden = self.shape.d_model, self.shape.hidden
        gate_up, down = self._draw(random, 2 * hidden, d) / 8, self._draw(random, d, hidden) / 8
        return Expert(self.device, gate_up, down, 0, 1, 1, hidden)

    def _covers(self, table: LayerTable, m: int) -> np.ndarray:
        covers = table.choose_covers(self.routes[m].experts.numpy(), np.zeros_like(self.positions), self.positions)
        return np.bincount(covers.ravel(), minlength=len(table.covers))

    # ------------------------------------------------------------ what is timed

    def stack(self) -> None:
        """As a run does it."""
        self.engine.run([self._take(m) for m in range(len(self.x))])

    async def _take(self, m: int) -> None:
        route, owners, recorder = self.routes[m], np.zeros_like(self.positions), self.engine.recorder
        load = np.bincount(route.experts.numpy().ravel(), minlength=self.shape.experts)
        for number in range(self.passes):
            x, key, begun = self.x[m], (m, number, PREFILL), recorder.since
            for layer, table in self.tables.items():
                covers = table.choose_covers(route.experts.numpy(), owners, self.positions)
                recorder.routed(layer, load)
                recorder.dispatching = key
                rows = dispatch(self.engine, None, layer, m, x, route, covers, self.most_rows)
                begin = recorder.since
                await rows.back
                recorder.waited(layer, key, begin, rows.back.at, len(rows.answers), rows.back.by)
                x = combine(x, route, rows)
                recorder.lap(COMBINE, layer, key, len(x))
            recorder.span(STEP, -1, key, begun, recorder.since, len(x), 0, -1)

    def pure(self) -> None:
        """This rank's experts on the rows that they get, and nothing else."""
        for layer, counts in self._calls():
            n = sum(counts)
            rows, answers = self.rows[:n], self.answers[:n]
            self.alone.add(Arrival(self.world.rank, 0, layer, 0, rows, answers, counts, n, Future()))
            while self.alone:
                self.alone.serve(2**62)

    def _calls(self) -> list[tuple[int, tuple[int, ...]]]:
        """(layer, rows of every slot) of every expert call of a round that has rows."""
        calls = [(layer, counts) for layer, each in self.rows_here.items() for counts in each if sum(counts)]
        return calls * self.passes

    def settle(self) -> None:
        """A CPU has done what it was given."""

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self.engine.free()


def measure_layers(world: MPI.Intracomm, layers: Any, n_layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per layer and microbatch of every round, the slowest rank's, by what was done. Collective.

    Args:
        layers: a `Layers` with `passes` and `x`, one entry for every microbatch.
        rounds: that count; one before them does not.
    """
    per_round = n_layers * len(layers.x) * layers.passes
    found = {}
    for name in layers.measured:
        work: Callable[[], None] = getattr(layers, name)
        found[name] = [_time(world, work, layers.settle) / per_round for _ in range(rounds + 1)][1:]
    return found


def trace_round(topology: Topology, layers: Any, stack: Stack, tokens: int, path: Path) -> float:
    """One more round of the stack, with a trace of level full of it at `path`; its ms per layer and microbatch.

    Collective.

    Args:
        layers: a `Layers` with an engine, whose stack has been timed.
        tokens: of a microbatch.
    """
    world, config = topology.world, stack.config()
    placement = place(config, world.size, PlacementOptions(), 1)
    job = json.dumps({"bench layer": {**asdict(stack), "tokens": tokens, "passes": layers.passes}})
    of = TraceOf(path, "full", math.inf, config, placement, stack.mode, job)
    tracer, quiet = Tracer(topology, of, resume=False, overwrite=True), layers.engine.recorder
    layers.engine.recorder = tracer.recorder
    seconds = _time(world, layers.stack, layers.settle)
    layers.engine.recorder = quiet
    tracer.finish({}, {})
    return 1e3 * seconds / (stack.layers * stack.microbatches * layers.passes)


def _time(world: MPI.Intracomm, work: Callable[[], None], settle: Callable[[], None]) -> float:
    settle()
    world.Barrier()
    begin = time.perf_counter()
    work()
    settle()
    return float(world.allreduce(time.perf_counter() - begin, op=MPI.MAX))


# ---------------------------------------------------------------- shared with the GPU


def plan(stack: Stack, n_ranks: int, tokens: int) -> tuple[dict[int, LayerTable], Tags, int]:
    """Routing tables as a run's, tags, and most rows of a message."""
    tables = layer_tables(place(stack.config(), n_ranks, PlacementOptions(), 1))
    pieces, rows = message_pieces(tokens * stack.top_k, 4 * stack.d_model, PIECE)
    return tables, Tags(stack.microbatches, pieces), rows


def scores_of(random: torch.Generator, tokens: int, stack: Stack) -> Tensor:
    """Scores [T, E] float32 whose K best are experts drawn without replacement, as often as `skew` says.

    Gumbel noise on logarithms of frequencies (Kool et al., 2019). Which experts are the busy ones is the same on
    every rank, and has nothing to do with their numbers.
    """
    place = torch.randperm(stack.experts, generator=torch.Generator().manual_seed(0)) + 1
    uniform = torch.rand(tokens, stack.experts, generator=random, device=random.device).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log() - stack.skew * place.to(random.device).float().log()


def channels(world: MPI.Intracomm) -> Channels:
    """Communicators of an engine. Collective."""
    return Channels(dispatch=world.Dup(), answers=world.Dup(), barrier=world.Dup())


def quiet_recorder(world: MPI.Intracomm, stack: Stack) -> Recorder:
    """One that notes nothing."""
    return Recorder("off", world.rank, world.size, stack.layers, stack.experts, stack.top_k)


def rows_of_slots(
    world: MPI.Intracomm, tables: dict[int, LayerTable], counts: dict[int, list[np.ndarray]]
) -> dict[int, list[tuple[int, ...]]]:
    """Rows that every slot of this rank gets from all ranks, by layer and microbatch. Collective.

    Args:
        counts: rows that this rank sends to every cover, which is a slot: no expert is cut.
    """
    found = {}
    for layer, table in tables.items():
        all_rows = world.allreduce(np.stack(counts[layer]), op=MPI.SUM)  # [M, S]
        begin, end = int(table.rank_begin[world.rank]), int(table.rank_begin[world.rank + 1])
        found[layer] = [tuple(row[begin:end].tolist()) for row in all_rows]
    return found


def most_rows_here(rows: dict[int, list[tuple[int, ...]]]) -> int:
    """Most rows of a microbatch that come to this rank in a layer."""
    return max((sum(counts) for each in rows.values() for counts in each), default=0)
