"""The way of a microbatch through a layer, one stage a line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import torch
from torch import Tensor

from moempi.batch import Step
from moempi.device import cpu_rows
from moempi.exchange.dispatch import Rows, combine, dispatch
from moempi.exchange.engine import Engine
from moempi.exchange.relay import Relay
from moempi.exchange.tasks import PAUSE
from moempi.model.cache import KVCache
from moempi.model.gate import Route, greedy
from moempi.model.network import Layer, Network
from moempi.stages import ATTEND, COMBINE, DENSE, EMBED, GATE, HEAD, PROJECT


@dataclass(frozen=True)
class Forward(ABC):
    """Takes microbatches through the network of one rank.

    Args:
        cache: keys and values of the sequences at home here.
        most_rows: rows of a message, above which it is sent in pieces.
        lockstep: meet all ranks after every layer.
    """

    network: Network
    engine: Engine
    cache: KVCache
    most_rows: int
    lockstep: bool

    async def __call__(self, step: Step) -> tuple[list[int], list[float]]:
        """Next token and its log-probability, for every sequence in `step.choosing`."""
        x = self.embed(step)  # [T, D]
        for layer in self.network.layers:
            x = await self.pass_layer(layer, x, step)
            if self.lockstep:
                await self.engine.meet(layer.number)
        return await self.choose(x, step)

    async def sit_out(self) -> None:
        """In lockstep, the part of a rank that has no tokens in this step."""
        for layer in self.network.layers:
            await self.engine.meet(layer.number)

    def embed(self, step: Step) -> Tensor:
        """Rows [T, D] of the step's tokens."""
        x = self.network.embed(step.tokens)
        self.lap(EMBED, -1, step, step.n_tokens)
        return x

    @abstractmethod
    async def pass_layer(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """One layer: rows [T, D] in, rows [T, D] out."""

    @abstractmethod
    async def choose(self, x: Tensor, step: Step) -> tuple[list[int], list[float]]:
        """Greedy choice from the last row of every sequence that is prefilled whole."""

    def lap(self, stage: int, layer: int, step: Step, tokens: int) -> None:
        """Note that all since the last lap of the rank was this stage of the step."""
        self.engine.recorder.lap(stage, layer, step.key, tokens)


@dataclass(frozen=True)
class CpuForward(Forward):
    """Gives way to messages between slices of work.

    Args:
        relay: for what goes to other nodes; None where everything goes straight to its rank.
    """

    relay: Relay | None

    async def pass_layer(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """One layer: rows [T, D] in, rows [T, D] out."""
        x = await self.attend(layer, x, step)
        if layer.dense:
            return await self.dense(layer, x, step)
        hidden, route = self.gate(layer, x, step)
        rows = await self.dispatch(layer, hidden, route, step)
        return self.combine(layer, x, route, rows, step)

    # ------------------------------------------------------------ the stages

    async def attend(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """Write this step's keys and values, then attend to all that the cache holds of each sequence."""
        plan, n = step.plan, step.n_tokens
        c, rotary = layer.config, self.network.rotary
        queries = torch.empty((n, c.n_heads, c.head_dim))
        mixed = torch.empty((n, c.n_heads * c.head_dim), dtype=x.dtype)
        attended = torch.empty_like(x)

        def project(lo: int, hi: int) -> None:
            rows, tables = layer.project_rows(x[lo:hi]), (rotary.cos, rotary.sin)
            cpu_rows.turn_heads(rows, layer.head_norm, tables, plan, lo, self.cache, layer.number, queries, c.norm_eps)

        def mix(lo: int, hi: int) -> None:
            cpu_rows.attend(queries, self.cache, layer.number, plan, lo, hi, mixed)

        def close(lo: int, hi: int) -> None:
            attended[lo:hi] = layer.close_attention(x[lo:hi], mixed[lo:hi])

        await self.sliced(PROJECT, layer.number, step, n, project)
        await self.sliced(ATTEND, layer.number, step, n, mix)
        await self.sliced(PROJECT, layer.number, step, n, close)
        return attended

    async def dense(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """The feed-forward network of a dense layer."""
        output = torch.empty_like(x)

        def compute(lo: int, hi: int) -> None:
            output[lo:hi] = layer.dense_mlp(x[lo:hi])

        await self.sliced(DENSE, layer.number, step, step.n_tokens, compute)
        return output

    def gate(self, layer: Layer, x: Tensor, step: Step) -> tuple[Tensor, Route]:
        """Normalised rows [T, D] and the experts that they go to."""
        hidden = layer.normed(x, layer.mlp_norm)
        route = layer.route(hidden)
        self.lap(GATE, layer.number, step, step.n_tokens)
        return hidden, route

    async def dispatch(self, layer: Layer, hidden: Tensor, route: Route, step: Step) -> Rows:
        """Rows to the slots of their experts, and back."""
        recorder = self.engine.recorder
        experts, positions = route.experts.numpy(), step.plan.positions.numpy()
        owners = step.owners.numpy()
        covers = self.engine.tables[layer.number].choose_covers(experts, owners, positions)
        self.note_routes(layer, route, step)
        recorder.dispatching = step.key
        rows = dispatch(self.engine, self.relay, layer.number, step.microbatch, hidden, route, covers, self.most_rows)
        begin = recorder.since
        await rows.back
        recorder.waited(layer.number, step.key, begin, rows.back.at, len(rows.answers), rows.back.by)
        return rows

    def combine(self, layer: Layer, x: Tensor, route: Route, rows: Rows, step: Step) -> Tensor:
        """Rows of the residual stream with their experts' outputs added."""
        x = combine(x, route, rows)
        self.lap(COMBINE, layer.number, step, step.n_tokens)
        return x

    async def choose(self, x: Tensor, step: Step) -> tuple[list[int], list[float]]:
        """Greedy choice from the last row of every sequence that is prefilled whole."""
        tokens: list[int] = []
        logprobs: list[float] = []

        def take(lo: int, hi: int) -> None:
            best, scores = greedy(self.network.logits(x[step.last[lo:hi]]))
            tokens.extend(best.tolist())
            logprobs.extend(scores.tolist())

        await self.sliced(HEAD, -1, step, len(step.last), take)
        return tokens, logprobs

    def note_routes(self, layer: Layer, route: Route, step: Step) -> None:
        """Count the load of every expert, and keep the routes themselves where the trace asks for them."""
        recorder, experts = self.engine.recorder, route.experts.numpy()
        recorder.routed(layer.number, np.bincount(experts.ravel(), minlength=layer.config.n_experts))
        if recorder.level == "routes":
            owners, positions = step.owners.numpy(), step.plan.positions.numpy()
            weights = route.weights.numpy()
            recorder.routes(layer.number, step.microbatch, step.number, owners, positions, experts, weights)

    # ------------------------------------------------------------ giving way

    async def sliced(self, stage: int, layer: int, step: Step, n: int, work: Callable[[int, int], None]) -> None:
        """Run `work(lo, hi)` over [0, n) in slices, looking at the network between them."""
        lo = 0
        while lo < n:
            hi = min(n, lo + self.engine.slicer.size(stage))
            begin = perf_counter_ns()
            work(lo, hi)
            self.engine.slicer.learn(stage, hi - lo, begin)
            self.lap(stage, layer, step, hi - lo)
            if hi < n:
                await PAUSE
            lo = hi
