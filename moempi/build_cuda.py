"""Building a rank on a GPU: the twin of `moempi.build`."""

from __future__ import annotations

import logging
from functools import partial

import torch

from moempi.build import Rank, load_slots, make_home
from moempi.device.cuda import Cuda
from moempi.device.cuda_attention import tiles_agree
from moempi.device.cuda_experts import Layer, Pieces, Scratch, Stack
from moempi.device.cuda_memory import MessageMemory, Rows, block_bytes
from moempi.device.tile_plan import TILE, WIDE_TILE, plan_step
from moempi.exchange.arrivals_cuda import CudaExperts
from moempi.exchange.dispatch_cuda import on_gpu
from moempi.exchange.engine import Channels, Engine, Limits
from moempi.exchange.engine_cuda import CudaEngine
from moempi.exchange.gpu_aware import choose_way
from moempi.exchange.host_memory import HostMemory
from moempi.exchange.slots import LayerTable, layer_tables
from moempi.exchange.topology import Topology
from moempi.files.weights import Weights, open_weights
from moempi.job import Job
from moempi.layer_cuda import CudaForward
from moempi.model.attention import Planner
from moempi.model.cache import KVCache
from moempi.model.config import ModelConfig
from moempi.model.expert import leaf_range
from moempi.model.network import Network
from moempi.planning import memory as plan
from moempi.planning.gpu_memory import (
    call_rows,
    frame_bytes,
    header_rows,
    largest_frame,
    steady_message_bytes,
    steady_message_rows,
    steady_rows,
)
from moempi.prepare import Shape
from moempi.recorder import Recorder
from moempi.router.control import Control

log = logging.getLogger("moempi")


def build_rank(
    topology: Topology,
    job: Job,
    shape: Shape,
    device: Cuda,
    recorder: Recorder,
    engine_type: type[Engine] = CudaEngine,
) -> Rank:
    """Read this rank's weights and put it together. Collective: duplicates communicators.

    Args:
        engine_type: a subclass of CudaEngine, for tests; any other class stands for CudaEngine itself.

    Raises:
        DataError: the weights cannot be read.
        JobError: `exchange.gpu_aware` asks for what does not work.
    """
    config, layout, world = shape.config, shape.layout, topology.world
    way = choose_way(topology, job.exchange.gpu_aware)
    tables = layer_tables(layout.placement)
    kv_tokens = layout.kv_tokens if world.rank in layout.homes else 0
    framed = not way.staged and are_framed(shape, job.run.capacity, job.model.leaves)
    memory = message_memory(shape, device, job.run.capacity, home=world.rank in layout.homes, framed=framed)
    with open_weights(job.model.weights) as weights:
        weights.expect(shape.model)
        layers = load_layers(weights, tables, world.rank, device, shape, job.model.leaves)
        network = Network(config, device, weights.tensor, shape.dtype)
    heads = config.n_kv_heads, config.head_dim
    cache = KVCache(config.n_layers, *heads, kv_tokens, shape.dtype, device.device, spare_pages=int(kv_tokens > 0))
    chosen = engine_type if issubclass(engine_type, CudaEngine) else CudaEngine
    engine = chosen(
        Channels(dispatch=world.Dup(), answers=world.Dup(), barrier=world.Dup()),
        tables,
        CudaExperts(layers, memory.memory.view(shape.dtype)),
        shape.dtype,
        config.d_model,
        layout.tags,
        Limits(layout.arrival_budget, job.engine.stall_timeout, job.engine.slice),
        recorder,
        payload=world.Dup(),
        memory=memory,
        host=HostMemory(world, memory.memory.nbytes) if way.staged else None,
        largest_frame=largest_frame(config, shape.dtype.itemsize, job.run.capacity, world.size) if framed else 0,
    )
    control = Control(world.Dup(), engine.requests)
    wide = most_rows_of_a_tile(config, shape.dtype, device) if world.rank in layout.homes else TILE
    planner = Planner(partial(plan_step, spare=cache.n_pages, wide=wide), lambda plan, _: plan.following)
    home = make_home(job, shape, engine, cache, control, planner)
    forward = CudaForward(
        network=network,
        engine=engine,
        cache=cache,
        most_rows=layout.piece_rows,
        lockstep=job.exchange.lockstep,
        tables=on_gpu(tables, device.device, header_rows(config, shape.dtype.itemsize) if framed else 0),
        packed=steady_rooms(memory, shape, job.run.capacity) if world.rank in layout.homes else [],
        most_steady=steady_rows(job.run.capacity),
    )
    return Rank(engine, home, control, forward, None, device, str(way))


def most_rows_of_a_tile(config: ModelConfig, dtype: torch.dtype, device: Cuda) -> int:
    """Query rows of attention's tiles in prefill: in exact mode many only where they give the bits of few."""
    if dtype != torch.bfloat16:
        return TILE
    if not device.exact:
        return WIDE_TILE
    agree = tiles_agree(config.n_heads, config.n_kv_heads, config.head_dim, dtype, device.device)
    torch.cuda.empty_cache()  # what the test took would not fit what comes
    if not agree:
        log.info("%s: attention by %d rows has other bits than by %d, which is taken", device.model, WIDE_TILE, TILE)
    return WIDE_TILE if agree else TILE


def are_framed(shape: Shape, capacity: int, leaves: int) -> bool:
    """Whether steady steps send frames: experts are whole, rows are of whole words, and a step's fit one piece."""
    config, most = shape.config, steady_rows(capacity) * shape.config.top_k
    whole_words = config.d_model * shape.dtype.itemsize % 4 == 0
    return bool(config.moe_layers) and leaves == 1 and whole_words and most <= shape.layout.piece_rows


def message_memory(shape: Shape, device: Cuda, capacity: int, *, home: bool, framed: bool) -> MessageMemory:
    """The arenas of a rank, as the memory plan has them; one that is no home sends no rows of its own."""
    config, layout, nbytes = shape.config, shape.layout, shape.dtype.itemsize
    sizes = config, nbytes, capacity, layout.placement.n_ranks
    own = plan.home_message_bytes(config, nbytes, layout.step_tokens, layout.placement)
    # Two parts of a block round up.
    spare = 2 * block_bytes([1, 1])
    own += steady_message_bytes(*sizes)
    sent = layout.n_microbatches * (own + 2 * spare) * home
    frames = frame_bytes(*sizes) if framed else 0
    return MessageMemory(device.device, sent, layout.arrival_budget + spare, frames)


def steady_rooms(memory: MessageMemory, shape: Shape, capacity: int) -> list[tuple[Rows, Rows]]:
    """For every microbatch what it keeps of the homes' memory: the rows of a steady step, and their answers."""
    n_ranks, dtypes = shape.layout.placement.n_ranks, (shape.dtype, shape.dtype)
    n = steady_message_rows(shape.config, shape.dtype.itemsize, capacity, n_ranks)
    rooms = []
    for _ in range(shape.layout.n_microbatches):
        pair = memory.take_pair(memory.home, n, shape.config.d_model, dtypes)
        assert pair is not None, "the memory was made for them"
        rooms.append(pair[1:])
    return rooms


def load_layers(
    weights: Weights, tables: dict[int, LayerTable], rank: int, device: Cuda, shape: Shape, leaves: int
) -> dict[int, Layer]:
    """The experts that a rank holds, layer by layer; nothing else of the experts is read."""
    layers: dict[int, Layer] = {}
    layout, dtype = shape.layout, shape.dtype
    step = layout.n_microbatches, layout.step_tokens, layout.arrival_budget
    scratch = Scratch(call_rows(shape.config, dtype.itemsize, layout.placement.n_ranks, *step))
    for layer, table in tables.items():
        if not table.slots_on(rank):
            continue
        if leaves == 1:
            layers[layer] = _load_stack(weights, table, rank, device, dtype, scratch)
        else:
            slots = load_slots(weights, {layer: table}, rank, device, dtype, leaves)
            layers[layer] = Pieces({number: expert for (_, number), expert in slots.items()})
    return layers


def _load_stack(
    weights: Weights, table: LayerTable, rank: int, device: Cuda, dtype: torch.dtype, scratch: Scratch
) -> Stack:
    """Whole experts, read one after the other into one stack."""
    hidden, d = weights.config.expert_hidden, weights.config.d_model
    n = table.slots_on(rank)
    gate_up = torch.empty(n, 2 * hidden, d, dtype=dtype, device=device.device)
    down = torch.empty(n, d, hidden, dtype=dtype, device=device.device)
    begin, end = leaf_range(0, 1, hidden)
    for slot in range(table.rank_begin[rank], table.rank_begin[rank + 1]):
        number = int(table.number[slot])
        read = weights.expert(table.layer, int(table.expert[slot]), begin, end)
        gate_up[number], down[number] = read[0].to(dtype), read[1].to(dtype)
    return Stack(gate_up, down, exact=device.exact, scratch=scratch)
