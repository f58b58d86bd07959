"""The stages of a layer on a GPU, in the order of `moempi.layer`; nothing is sliced, nothing waits.

A steady step, one token of each sequence, has a way of its own (`pass_steady`), most of it recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moempi.batch import Step
from moempi.device.cuda_attention import attend
from moempi.device.cuda_graphs import Graphs
from moempi.device.cuda_memory import Rows
from moempi.device.cuda_rows import Headers, add_norm, choose_experts, greedy, scatter, sort_pairs, turn_heads
from moempi.device.cuda_rows import combine as add_outputs
from moempi.device.cuda_transfer import all_to_device, staged, views, words_of
from moempi.device.tile_plan import TilePlan, for_kernels
from moempi.errors import MoempiError
from moempi.exchange.dispatch_cuda import CudaRows, CudaTable, Sent, combine, dispatch, send
from moempi.exchange.engine_cuda import CudaEngine
from moempi.layer import Forward
from moempi.model.gate import Route
from moempi.model.network import Layer
from moempi.stages import ATTEND, COMBINE, COMPOSE, DENSE, EMBED, GATE, HEAD


class StepBuffers:
    """Where the steady steps of a microbatch find everything at the same place each time, so that graphs can.

    Args:
        packed, answers: of the memory of messages: rows of the most tokens of a step with their headers, and as many.
        rows: tokens of such a step.
        top_k: K.
    """

    def __init__(self, packed: Rows, answers: Rows, rows: int, top_k: int, dtype: torch.dtype, device: torch.device):
        self.packed, self.answers = packed, answers
        # each [rows, D]
        self.x, self.attended, self.hidden = torch.zeros(3, rows, packed.d, dtype=dtype, device=device)
        self.places = torch.empty(rows, top_k, dtype=torch.int32, device=device)
        self.weights = torch.empty(rows, top_k, dtype=torch.float32, device=device)
        self.step = torch.empty(0, dtype=torch.int64, device=device)
        self.last: CudaStep | None = None  # the last that was not put together ahead
        self.ahead: Ahead | None = None
        self.begun: Begun | None = None
        self.follows = False  # the step under way is one that was put together ahead
        self.steps_ahead = self.steps_begun = self.steps_in_vain = 0
        self.graphs = Graphs()

    def room_for_step(self, words: int) -> Tensor:
        """int64 [>= words] for what a step tells the kernels; the same memory each time, while it is large enough."""
        if len(self.step) < words:
            # A recording that is under way, of a step that was begun in vain, goes when it has ended: CUDA sees to it.
            self.step, self.graphs = self.step.new_empty(2 * words), Graphs()
        return self.step

    def to_begin(self, step: CudaStep) -> Ahead | None:
        """The step that follows this one, if it is put together and likely to come: sequences have stayed so far."""
        return self.ahead if self.follows and self.ahead and self.ahead.after is step.host else None

    def drop_begun(self) -> None:
        """The step that comes is of other sequences: what was begun of the one that was put together was in vain."""
        self.steps_in_vain += self.begun is not None
        self.begun, self.follows = None, False

    def put(self, ahead: Ahead) -> None:
        """What a step tells the kernels, with the tokens that it has, to where they read it."""
        self.step[: len(ahead.words)].copy_(ahead.words, non_blocking=True)


class Ahead(NamedTuple):
    """A step of the same sequences as the last, put together before its tokens are known."""

    after: TilePlan  # of the step before it
    plan: TilePlan
    words: Tensor  # what it tells the kernels, in pinned memory, as in `StepBuffers.step`
    tokens: Tensor  # of them, those that are missing
    there: CudaStep  # whose tensors lie where its own will


class Begun(NamedTuple):
    """The first layer of a step, launched before the host knew its tokens."""

    route: Route | None


@dataclass(frozen=True)
class CudaStep(Step):
    """A step whose tensors are on the GPU; `owners` and the positions of `host` stay on the host, for the trace."""

    turns: Tensor  # [T] int64, sequence + position of every token: which replica takes it; of padding -1
    host: TilePlan
    buffers: StepBuffers | None  # of a steady step

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """What a recording of a steady step depends on: where what it reads lies, and how much there is."""
        where = self.plan.positions.data_ptr(), self.turns.data_ptr()
        return *where, len(self.plan.positions), self.plan.pages.shape[1]


@dataclass(frozen=True)
class CudaForward(Forward):
    """Launches whole stages, without slices; steady steps are recorded and launched again.

    Args:
        tables: routing tables on the GPU.
        packed: by microbatch, memory of messages for the rows of a steady step and for their answers.
        most_steady: tokens of such a step, at most.
        buffers: by microbatch, what its steady steps use; made when the first one comes.
    """

    engine: CudaEngine
    tables: dict[int, CudaTable]
    packed: list[tuple[Rows, Rows]]
    most_steady: int
    buffers: dict[int, StepBuffers] = field(default_factory=dict)

    async def __call__(self, step: Step) -> tuple[list[int], list[float]]:
        """Next token and its log-probability, for every sequence in `step.choosing`."""
        there = self.on_gpu(step)
        self.engine.meanwhile(step.microbatch, *self.look_ahead(step, there.buffers))
        return await super().__call__(there)

    def on_gpu(self, step: Step) -> CudaStep:
        """A step of the host, on the GPU."""
        device, plan = self.cache.keys.device, step.plan
        if used := self.buffers.get(step.microbatch):
            if used.ahead and used.ahead.plan is plan:
                return self.ahead_on_gpu(step, used, used.ahead)
            used.drop_begun()
        buffers = self.buffers_of(step.microbatch) if plan.steady else None
        tensors = for_kernels(step)
        n = words_of(tensors)
        memory = buffers.room_for_step(n) if buffers else torch.empty(n, dtype=torch.int64, device=device)
        there = all_to_device(tensors, memory)
        kept = {f.name: getattr(step, f.name) for f in fields(step) if f.name not in ("tokens", "last", "plan")}
        mine = {name: there.pop(name) for name in ("tokens", "last", "turns")}
        made = CudaStep(**kept, **mine, plan=replace(plan, **there), host=plan, buffers=buffers)  # type: ignore[arg-type]
        if buffers:
            buffers.last = replace(made, buffers=None)  # no circle, which would keep memory of the GPU
        return made

    def ahead_on_gpu(self, step: Step, buffers: StepBuffers, ahead: Ahead) -> CudaStep:
        """The step that has been put together ahead, with its tokens; they are there if it has begun."""
        if not buffers.begun:
            ahead.tokens.copy_(step.tokens)
            buffers.put(ahead)
        buffers.follows = True
        buffers.steps_ahead += 1
        return replace(ahead.there, number=step.number, host=step.plan, buffers=buffers)

    def look_ahead(self, step: Step, buffers: StepBuffers | None) -> list[Callable[[], None]]:
        """What puts together what the next steady step of the same sequences tells the kernels, in three works."""
        if buffers is None:
            return []
        tensors: dict[str, Tensor] = {}

        def plan() -> None:
            _ = step.plan.following

        def collect() -> None:
            # A sequence may end by its token as well, which nobody knows yet.
            stay = all(sequence.remaining > 1 for sequence in step.sequences)
            if stay and step.plan.following is not None:
                # Of its tokens it is known how many they are: this step's stand for them.
                tensors.update(for_kernels(replace(step, plan=step.plan.following)))

        def stage() -> None:
            if tensors:
                assert buffers.last is not None, "the step that is under way, or one before"
                words = staged(tensors)
                tokens = views(tensors, words)["tokens"]
                buffers.ahead = Ahead(step.plan, step.plan.following, words, tokens, buffers.last)

        def noted(work: Callable[[], None]) -> None:
            work()
            self.lap(COMPOSE, -1, step, 0)

        return [partial(noted, work) for work in (plan, collect, stage)]

    def begin(self, ahead: Ahead, step: CudaStep, buffers: StepBuffers) -> None:
        """Launch the first layer of the step that follows, whose tokens are on the GPU already; nothing leaves.

        Where a sequence turns out to have ended this was in vain, and does no harm: all is on one stream. Keys and
        values are those that the step writes again which is made instead, or lie on pages of sequences that have
        ended, and whoever gets these writes behind it.
        """
        first = self.network.layers[0]
        self.embed_steady(ahead.there, buffers)
        buffers.steps_begun += 1
        buffers.begun = Begun(self.run_until_sent(first, ahead.there, buffers))
        self.lap(ATTEND, first.number, step, 0)

    def buffers_of(self, microbatch: int) -> StepBuffers:
        """Memory of a microbatch's steady steps, made when the first one comes."""
        if microbatch not in self.buffers:
            top_k, network = self.network.config.top_k, self.network
            packed, device = self.packed[microbatch], self.cache.keys.device
            self.buffers[microbatch] = StepBuffers(*packed, self.most_steady, top_k, network.dtype, device)
        return self.buffers[microbatch]

    async def pass_layer(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """One layer: rows [T, D] in, rows [T, D] out."""
        assert isinstance(step, CudaStep)
        if step.buffers is not None:
            await self.pass_steady(layer, x, step, step.buffers)
            return x
        if layer.dense:
            x = layer.close_attention(x, self.mix(layer, x, step))
            self.lap(ATTEND, layer.number, step, step.n_tokens)
            x = layer.dense_mlp(x)
            self.lap(DENSE, layer.number, step, step.n_tokens)
            return x
        attended, hidden = torch.empty_like(x), torch.empty_like(x)
        # Nothing else of attention is kept while rows are on their way.
        self.close_and_norm(layer, x, self.mix(layer, x, step), attended, hidden)
        self.lap(ATTEND, layer.number, step, step.n_tokens)
        route = layer.route(hidden)
        self.lap(GATE, layer.number, step, step.n_tokens)
        rows = await self.dispatch(layer, hidden, route, step)
        return self.combine(layer, attended, route, rows, step)

    def close_and_norm(self, layer: Layer, x: Tensor, mixed: Tensor, attended: Tensor, hidden: Tensor) -> None:
        """Rows x [R, D] with attention's output added, into `attended`, and normalised for the experts, `hidden`."""
        add_norm(x, layer.output(mixed), layer.mlp_norm, layer.config.norm_eps, attended, hidden)

    # ------------------------------------------------------------ steady steps

    async def pass_steady(self, layer: Layer, x: Tensor, step: CudaStep, buffers: StepBuffers) -> None:
        """One layer of a steady step, in place: x is the first rows of `buffers.x`, up to what is combined later."""
        n, number = step.n_tokens, layer.number
        if buffers.begun:
            route, buffers.begun = buffers.begun.route, None
        else:
            route = self.run_until_sent(layer, step, buffers)
        self.lap(ATTEND, number, step, n)
        if route is None:
            return
        if self.is_recorded_whole(number):
            await self.returned(layer, step, route, await self.send_steady(layer, step, buffers))
            if number + 1 < len(self.network.layers):
                return  # the next one combines
            self.combine_steady(n, buffers)
        else:
            route = Route(route.experts[:n], route.weights[:n])
            rows = await self.dispatch(layer, buffers.hidden[:n], route, step)
            combine(self.engine, buffers.attended[:n], route, rows, out=x)
        self.lap(COMBINE, number, step, n)

    async def send_steady(self, layer: Layer, step: CudaStep, buffers: StepBuffers) -> Sent:
        """Send the rows that a recording has packed, once the host knows how many go where."""
        of_layer, n = self.tables[layer.number], step.n_tokens * layer.config.top_k
        table, microbatch, rooms = of_layer.table, step.microbatch, (buffers.packed, buffers.answers)
        counts = await self.engine.counted(microbatch, len(table.covers))
        headers = of_layer.header_rows
        back = send(self.engine, table, microbatch, counts, *rooms, self.most_rows, step.key, headers)
        return Sent(counts, n, back)

    def is_recorded_whole(self, number: int) -> bool:
        """Whether a layer's recording packs its rows, and the next one's combines them: its slots are whole experts."""
        return number in self.tables and not self.tables[number].table.cut

    def run_until_sent(self, layer: Layer, step: CudaStep, buffers: StepBuffers) -> Route | None:
        """Do `until_sent`, recorded where it has been done before."""
        return buffers.graphs.run(step.shape, layer.number, lambda: self.until_sent(layer, step, buffers))

    def until_sent(self, layer: Layer, step: CudaStep, buffers: StepBuffers) -> Route | None:
        """A steady step from the answers of the layer before to the rows that leave; padding goes along, but not away.

        A dense layer goes from `buffers.x` to `buffers.x`, and has no route.
        """
        n = len(step.plan.positions)
        if self.is_recorded_whole(layer.number - 1):
            self.combine_steady(n, buffers)
        x, attended, hidden = buffers.x[:n], buffers.attended[:n], buffers.hidden[:n]
        mixed = self.mix(layer, x, step)
        if layer.dense:
            x.copy_(layer.dense_mlp(layer.close_attention(x, mixed)))
            return None
        self.close_and_norm(layer, x, mixed, attended, hidden)
        # `Layer.route`, with the weights where the next layer's recording finds them.
        weights, c = buffers.weights[:n], layer.config
        route = Route(*choose_experts(layer.gate(hidden), c.top_k, c.normalize_gate, weights))
        if self.is_recorded_whole(layer.number):
            self.pack_steady(layer.number, step, route, buffers)
        return route

    def pack_steady(self, number: int, step: CudaStep, route: Route, buffers: StepBuffers) -> None:
        """Rows in the order in which they leave, and on the host how many each cover gets."""
        table, n, packed = self.tables[number], len(step.turns), buffers.packed
        landing = self.engine.counts(step.microbatch, len(table.table.covers))
        replicas, places = (table.cover_of, table.n_replicas), buffers.places[:n]
        headers = None
        if table.header_rows:
            row = packed.d * packed.memory.itemsize
            headers = Headers(table.headers, packed.address, row)
        sort_pairs(route.experts, step.turns, *replicas, number, landing, places, headers)
        scatter(buffers.hidden[:n], places, packed.address)

    def combine_steady(self, n: int, buffers: StepBuffers) -> None:
        """Rows of the residual stream with their experts' outputs added, of the layer that came back last."""
        outputs = buffers.answers.tensor()
        add_outputs(buffers.attended[:n], outputs, buffers.places[:n], buffers.weights[:n], buffers.x[:n])

    # ------------------------------------------------------------ the stages

    def embed(self, step: Step) -> Tensor:
        """Rows [T, D] of the step's tokens."""
        assert isinstance(step, CudaStep)
        if step.buffers is None:
            return super().embed(step)
        if not step.buffers.begun:
            self.embed_steady(step, step.buffers)
        self.lap(EMBED, -1, step, step.n_tokens)
        return step.buffers.x[: step.n_tokens]

    def embed_steady(self, step: CudaStep, buffers: StepBuffers) -> None:
        """Rows of the step's tokens, into `buffers.x`."""
        torch.index_select(self.network.embedding, 0, step.tokens, out=buffers.x[: step.n_tokens])

    def mix(self, layer: Layer, x: Tensor, step: Step) -> Tensor:
        """Attention before its output's projection, of rows [R, D]; their keys and values go into the cache."""
        plan, number, rotary = step.plan, layer.number, self.network.rotary
        keys, values = self.cache.keys[number], self.cache.values[number]
        rows, tables = layer.project_rows(x), (rotary.cos, rotary.sin)
        queries = turn_heads(rows, layer.head_norm, layer.config.norm_eps, tables, plan, keys, values)
        return attend(queries, keys, values, plan)

    async def dispatch(self, layer: Layer, hidden: Tensor, route: Route, step: Step) -> CudaRows:
        """Rows to the slots of their experts, and back."""
        assert isinstance(step, CudaStep)
        table, turns = self.tables[layer.number], step.turns[: step.n_tokens]
        rows, sent = await dispatch(
            self.engine, table, step.microbatch, hidden, route, turns, self.most_rows, step.key
        )
        await self.returned(layer, step, route, sent)
        return rows

    async def returned(self, layer: Layer, step: CudaStep, route: Route, sent: Sent) -> None:
        """Until the answers of a dispatch are there; the trace hears of it."""
        recorder, back = self.engine.recorder, sent.back
        recorder.routed(layer.number, self.tables[layer.number].table.load(sent.counts))
        begin = recorder.since
        if recorder.level == "routes":
            await self.keep_routes(layer, route, step)
        await back
        recorder.waited(layer.number, step.key, begin, back.at, sent.rows, back.by)

    def combine(self, layer: Layer, x: Tensor, route: Route, rows: CudaRows, step: Step) -> Tensor:
        """Rows of the residual stream with their experts' outputs added."""
        x = combine(self.engine, x, route, rows)
        self.lap(COMBINE, layer.number, step, step.n_tokens)
        return x

    async def choose(self, x: Tensor, step: Step) -> tuple[list[int], list[float]]:
        """Greedy choice from the last row of every sequence that is prefilled whole.

        Raises:
            MoempiError: a score is not a number.
        """
        assert isinstance(step, CudaStep)
        n, buffers = len(step.last), step.buffers
        ahead = buffers.to_begin(step) if buffers else None
        if buffers and ahead:
            buffers.put(ahead)
        # The kernel writes into memory of the host: there is nothing to copy.
        tokens = torch.empty(n, dtype=torch.int64, pin_memory=True)
        logprobs = torch.empty(n, dtype=torch.float32, pin_memory=True)
        next_tokens = ahead.there.tokens if ahead else None
        greedy(self.network.logits(x if n == len(x) else x[step.last]), (tokens, logprobs), next_tokens)
        self.lap(HEAD, -1, step, n)
        chosen = self.engine.mark()
        if buffers and ahead:
            self.begin(ahead, step, buffers)
        await chosen
        if not np.isfinite(logprobs.numpy()).all():
            raise MoempiError("the scores of the next token are not finite: the weights overflow in this dtype")
        return tokens.tolist(), logprobs.tolist()

    async def keep_routes(self, layer: Layer, route: Route, step: CudaStep) -> None:
        """The routes themselves, of what is not padding, where the trace asks for them."""
        n = step.n_tokens
        experts, weights = await self.engine.fetch(route.experts[:n], route.weights[:n])
        owners, positions = step.owners.numpy(), step.host.positions[:n].numpy()
        recorder = self.engine.recorder
        recorder.routes(layer.number, step.microbatch, step.number, owners, positions, experts, weights)
