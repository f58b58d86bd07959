"""Building a rank: its slots, its shared weights, its cache, its engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moempi.device.cpu import Cpu
from moempi.device.seam import Device
from moempi.exchange.arrivals import Experts, SlotKey
from moempi.exchange.doorbell import hang_doorbells
from moempi.exchange.engine import SPIN, Channels, Engine, Limits
from moempi.exchange.hops import Sizes, build_hops, row_bytes
from moempi.exchange.relay import Relay
from moempi.exchange.relay_plan import RELAYED, Ways
from moempi.exchange.slots import LayerTable, layer_tables
from moempi.exchange.topology import Topology
from moempi.files.weights import Weights, open_weights
from moempi.home import Home
from moempi.job import Job
from moempi.layer import CpuForward, Forward
from moempi.model.attention import ON_CPU, Planner
from moempi.model.cache import KVCache
from moempi.model.expert import Expert, leaf_range
from moempi.model.network import Network
from moempi.prepare import Shape
from moempi.recorder import Recorder
from moempi.router.control import Control


@dataclass(frozen=True)
class Rank:
    """One rank, ready to work."""

    engine: Engine
    home: Home
    control: Control
    forward: Forward
    relay: Relay | None
    device: Device
    messages: str = ""  # on a GPU: how rows travel, and why so

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self.engine.free()
        if self.relay is not None:
            self.relay.free()
        self.control.free()


def build_rank(
    topology: Topology, job: Job, shape: Shape, device: Cpu, recorder: Recorder, engine_type: type[Engine] = Engine
) -> Rank:
    """Read this rank's weights and put it together. Collective: duplicates communicators.

    Raises:
        DataError: the weights cannot be read.
    """
    config, layout, world = shape.config, shape.layout, topology.world
    tables = layer_tables(layout.placement)
    with open_weights(job.model.weights) as weights:
        weights.expect(shape.model)
        experts = load_slots(weights, tables, world.rank, device, shape.dtype, job.model.leaves)
        network = Network(config, device, weights.tensor, shape.dtype)
    kv_tokens = layout.kv_tokens if world.rank in layout.homes else 0
    cache = KVCache(config.n_layers, config.n_kv_heads, config.head_dim, kv_tokens, shape.dtype)
    engine = engine_type(
        Channels(dispatch=world.Dup(), answers=world.Dup(), barrier=world.Dup()),
        tables,
        Experts(experts, device.threads),
        shape.dtype,
        config.d_model,
        layout.tags,
        Limits(
            layout.arrival_budget,
            job.engine.stall_timeout,
            job.engine.slice,
            SPIN if topology.cores >= device.threads else 0.0,
        ),
        recorder,
    )
    engine.requests.bell = hang_doorbells(world)
    relay = build_relay(topology, shape, tables, engine)
    control = Control(world.Dup(), engine.requests)
    home = make_home(job, shape, engine, cache, control)
    forward = CpuForward(network, engine, cache, layout.piece_rows, job.exchange.lockstep, relay)
    return Rank(engine, home, control, forward, relay, device)


def make_home(
    job: Job, shape: Shape, engine: Engine, cache: KVCache, control: Control, planner: Planner = ON_CPU
) -> Home:
    """The sequences of a rank, as the job and its layout have them.

    Args:
        planner: the device's plans of attention.
    """
    config, layout = shape.config, shape.layout
    return Home(
        engine,
        cache,
        capacity=job.run.capacity,
        n_microbatches=layout.n_microbatches,
        n_decoding=layout.n_decoding,
        budget=layout.step_tokens,
        group=config.n_heads // config.n_kv_heads,
        eos_tokens=shape.eos_tokens,
        tell=lambda message: control.send(0, message),
        planner=planner,
    )


def build_relay(topology: Topology, shape: Shape, tables: dict[int, LayerTable], engine: Engine) -> Relay | None:
    """What a rank needs for a relayed route, None where the route is direct. Collective."""
    layout, config = shape.layout, shape.config
    if layout.route.name not in RELAYED or not tables:
        return None
    ways = Ways(layout.route.name, layout.nodes)
    rows = row_bytes(tables, config.d_model, shape.dtype.itemsize, fast=layout.mode == "fast")
    sizes = Sizes(layout.relay_budget, layout.relay_message_bytes, rows, layout.piece_rows, config.top_k)
    relay = Relay(engine, ways, build_hops(topology.world, ways), sizes)
    engine.takers.append(relay)
    return relay


def load_slots(
    weights: Weights, tables: dict[int, LayerTable], rank: int, device: Device, dtype: torch.dtype, leaves: int
) -> dict[SlotKey, Expert]:
    """The experts, or parts of them, that a rank holds; nothing else of the experts is read."""
    hidden = weights.config.expert_hidden
    slots: dict[SlotKey, Expert] = {}
    for layer, table in tables.items():
        for slot in range(table.rank_begin[rank], table.rank_begin[rank + 1]):
            lo, hi = int(table.lo[slot]), int(table.hi[slot])
            begin, end = leaf_range(lo, leaves, hidden)[0], leaf_range(hi - 1, leaves, hidden)[1]
            matrices: tuple[Tensor, Tensor] = weights.expert(layer, int(table.expert[slot]), begin, end)
            gate_up, down = (matrix.to(dtype) for matrix in matrices)
            slots[layer, int(table.number[slot])] = Expert(device, gate_up, down, lo, hi, leaves, hidden)
    return slots
