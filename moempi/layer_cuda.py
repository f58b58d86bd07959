"""The stages of a layer on a GPU. The way through them is `moempi.layer`'s; nothing is sliced, nothing waits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from moempi.batch import Step
from moempi.device.cuda_attention import attend
from moempi.device.cuda_rows import turn_heads
from moempi.device.cuda_transfer import to_device
from moempi.errors import MoempiError
from moempi.exchange.dispatch_cuda import CudaRows, CudaTable, combine, dispatch
from moempi.exchange.engine_cuda import CudaEngine
from moempi.layer import Forward
from moempi.model.gate import Route
from moempi.model.network import Layer
from moempi.stages import ATTEND, COMBINE, HEAD


@dataclass(frozen=True)
class CudaStep(Step):
    """A step whose tensors are on the GPU; `owners` and the positions of `host` stay on the host, for the trace."""

    turns: Tensor  # [T] int64, sequence + position of every token: which replica takes it
    host: Any  # TilePlan


@dataclass(frozen=True)
class CudaForward(Forward):
    """Takes microbatches through the network of one rank.

    Args:
        tables: routing tables on the GPU.
    """

    engine: CudaEngine
    tables: dict[int, CudaTable]

    async def __call__(self, step: Step) -> tuple[list[int], list[float]]:
        """Next token and its log-probability, for every sequence in `step.choosing`."""
        return await super().__call__(self.on_gpu(step))

    def on_gpu(self, step: Step) -> CudaStep:
        """A step of the host, on the GPU."""
        device = self.cache.keys.device
        kept = {f.name: getattr(step, f.name) for f in fields(step) if f.name not in ("tokens", "last", "plan")}
        return CudaStep(
            **kept,
            tokens=to_device(step.tokens, device),
            last=to_device(step.last, device),
            plan=step.plan.on(device),
            turns=to_device(step.owners + step.plan.positions, device),
            host=step.plan,
        )

    async def attend(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """Write this step's keys and values, then attend to all that the cache holds of each sequence."""
        plan, number, rotary = step.plan, layer.number, self.network.rotary
        keys, values = self.cache.keys[number], self.cache.values[number]
        rows, tables = layer.project_rows(x), (rotary.cos, rotary.sin)
        queries = turn_heads(rows, layer.head_norm, layer.config.norm_eps, tables, plan, keys, values)
        mixed = attend(queries, keys, values, plan)
        attended = layer.close_attention(x, mixed)
        self.lap(ATTEND, number, step, step.n_tokens)
        return attended

    async def dispatch(self, layer: Layer, hidden: Tensor, route: Route, step: Step) -> CudaRows:  # type: ignore[override]
        """Rows to the slots of their experts, and back."""
        assert isinstance(step, CudaStep)
        table, recorder = self.tables[layer.number], self.engine.recorder
        rows, back = await dispatch(
            self.engine, table, step.microbatch, hidden, route, step.turns, self.most_rows, step.key
        )
        load = np.bincount(table.expert_of_cover, weights=rows.counts, minlength=layer.config.n_experts)
        recorder.routed(layer.number, load.astype(np.int64))
        begin = recorder.since
        if recorder.level == "routes":
            await self.keep_routes(layer, route, step)
        await back
        recorder.waited(layer.number, step.key, begin, back.at, len(rows.answers), back.by)
        return rows

    def combine(self, layer: Layer, x: Tensor, route: Route, rows: CudaRows, step: Step) -> Tensor:  # type: ignore[override]
        """Rows of the residual stream with their experts' outputs added."""
        x = combine(self.engine, x, route, rows)
        self.lap(COMBINE, layer.number, step, step.n_tokens)
        return x

    async def choose(self, x: Tensor, step: Step) -> tuple[list[int], list[float]]:
        """Greedy choice from the last row of every sequence that is prefilled whole.

        Raises:
            MoempiError: a score is not a number.
        """
        chosen = self.network.device.greedy(self.network.logits(x[step.last]))
        self.lap(HEAD, -1, step, len(step.last))
        tokens, logprobs = await self.engine.fetch(*chosen)
        if not np.isfinite(logprobs).all():
            raise MoempiError("the scores of the next token are not finite: the weights overflow in this dtype")
        return tokens.tolist(), logprobs.tolist()

    async def keep_routes(self, layer: Layer, route: Route, step: CudaStep) -> None:
        """The routes themselves, where the trace asks for them."""
        experts, weights = await self.engine.fetch(route.experts, route.weights)
        owners, positions = step.owners.numpy(), step.host.positions.numpy()
        recorder = self.engine.recorder
        recorder.routes(layer.number, step.microbatch, step.number, owners, positions, experts, weights)
