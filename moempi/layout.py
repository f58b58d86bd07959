"""What a job comes to on N ranks, before any of them allocates: slots, microbatches, messages, memory.

Pure: no MPI, no torch, no files but a placement that is given. `moempi run --dry-run` prints it, `run` keeps to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from moempi.errors import FitError, JobError
from moempi.exchange.nodes import Nodes, one_node, pretended
from moempi.exchange.plan import Tags, message_pieces
from moempi.exchange.relay_plan import RELAYED, Ways
from moempi.exchange.slots import answer_itemsize, layer_tables
from moempi.files.placement import fits, read_placement
from moempi.job import Job
from moempi.model.config import PAGE, ModelConfig
from moempi.planning import memory
from moempi.planning.gpu_memory import CALL_ROWS
from moempi.planning.links import Links
from moempi.planning.placement import Placement, check_strict, place
from moempi.planning.routes import Route, Work, choose_route, steps_of_a_home
from moempi.router.admission import home_ranks

Fitted = TypeVar("Fitted")

# Tokens of a microbatch in a step, where a job leaves them to the device.
CPU_PREFILL, GPU_PREFILL = 512, (8192, 4096, 2048, 1024, 512)
KV_KEPT = 0.9  # of the KV cache, with steps of more tokens than the least


@dataclass(frozen=True)
class Layout:
    """The decisions that a job file leaves open, made."""

    n_ranks: int
    device: str  # "cpu" or "cuda"
    dtype: str  # "float32" or "bfloat16"
    placement: Placement
    homes: tuple[int, ...]
    n_microbatches: int
    n_decoding: int  # microbatches, of those, that take the sequences that have one token to go in a step
    step_tokens: int  # most tokens of a microbatch
    kv_tokens: int  # positions in a home's KV cache
    kv_wanted: int  # that would do for `run.capacity` sequences at a time
    arrival_budget: int  # bytes
    tags: Tags
    piece_rows: int  # most rows of one message
    memory: tuple[memory.RankMemory, ...]
    nodes: Nodes
    route: Route
    relay_budget: int  # bytes, for each kind of hops
    mode: str  # "exact" or "fast"

    @property
    def relay_message_bytes(self) -> int:
        """Most bytes of a message in which a relay puts several parcels."""
        return self.relay_budget // 2


def lay_out(
    job: Job,
    config: ModelConfig,
    dtype: str,
    n_ranks: int,
    positions: Sequence[int],
    load: np.ndarray | None = None,
    *,
    new_tokens: Sequence[int] = (),
    nodes: Nodes | None = None,
    links: Links | None = None,
    device: str = "cpu",
    gpu_bytes: int = 0,
) -> Layout:
    """Decide the layout of a job; what it leaves to the device is decided here.

    Args:
        dtype: of weights and activations, "float32" or "bfloat16".
        positions: that every sequence can come to fill in the KV cache.
        load: measured rows per MoE layer and expert [L, E], for `balanced`.
        new_tokens: of every sequence, for the choice of a route.
        nodes: that the ranks are on; None: all on one. What the job pretends comes before both.
        links: measured, for `exchange.route = "auto"`.
        device: "cpu" or "cuda".
        gpu_bytes: of a GPU that a rank may take, where there is no `memory.limit`; 0: not known.

    Raises:
        FitError: it does not fit the ranks or `memory.limit`, with numbers on both sides.
        JobError, DataError: the placement file does not belong to this job, or its mode is not to be had.
    """
    attempt = partial(
        _lay_out, job, config, dtype, n_ranks, positions, load, new_tokens, nodes, links, device, gpu_bytes
    )
    *longer, least = _prefill_sizes(job, device)
    shortest: Layout | None = None
    for tokens in longer:
        with suppress(FitError):
            found = attempt(tokens)
            if found.kv_tokens == found.kv_wanted:
                return found
            # Longer steps save time, but not at the expense of sequences that then have to wait.
            shortest = shortest or attempt(least)
            if found.kv_tokens >= KV_KEPT * shortest.kv_tokens:
                return found
    return shortest or attempt(least)


def _prefill_sizes(job: Job, device: str) -> tuple[int, ...]:
    """Tokens of a microbatch in a step that may be taken, the most first."""
    if job.run.prefill_tokens == "auto":
        return GPU_PREFILL if device == "cuda" else (CPU_PREFILL,)
    return (job.run.prefill_tokens,)


def _lay_out(
    job: Job,
    config: ModelConfig,
    dtype: str,
    n_ranks: int,
    positions: Sequence[int],
    load: np.ndarray | None,
    new_tokens: Sequence[int],
    nodes: Nodes | None,
    links: Links | None,
    device: str,
    gpu_bytes: int,
    prefill_tokens: int,
) -> Layout:
    nbytes = {"float32": 4, "bfloat16": 2}[dtype]
    homes = home_ranks(job.admission.policy, job.admission.homes, n_ranks)
    # Fewer sequences than places: what a home really holds decides.
    held = min(job.run.capacity, -(-len(positions) // len(homes)))
    microbatches = _microbatches(job, config, n_ranks, held, device)
    step_tokens = max(prefill_tokens, job.run.capacity)
    budget = memory.arrival_budget(job.exchange.arrival_budget, config, nbytes, step_tokens)
    least, wanted = _kv_tokens(job, positions)
    fitting = _Fitting(
        job=job,
        config=config,
        nbytes=nbytes,
        n_ranks=n_ranks,
        load=load,
        homes=homes,
        nodes=_nodes(job, n_ranks, nodes),
        links=links,
        device=device,
        steps=steps_of_a_home(positions, new_tokens, len(homes), max(1, held // microbatches.decoding), step_tokens),
        relay_budget=memory.relay_budget(job.exchange.relay_budget, config, nbytes, step_tokens),
        sizes=_sizes(job, step_tokens, microbatches.n, budget, device),
        gpu_bytes=gpu_bytes,
    )
    kv_tokens, placement, route, plans = most_that_fits(least, wanted, fitting)
    pieces, rows = _pieces(job, config, step_tokens, device)
    return Layout(
        n_ranks=n_ranks,
        device=device,
        dtype=dtype,
        placement=placement,
        homes=tuple(homes),
        n_microbatches=microbatches.n,
        n_decoding=microbatches.decoding,
        step_tokens=step_tokens,
        kv_tokens=kv_tokens,
        kv_wanted=wanted,
        arrival_budget=budget,
        tags=Tags(microbatches.n, pieces),
        piece_rows=rows,
        memory=tuple(plans),
        nodes=fitting.nodes,
        route=route,
        relay_budget=fitting.relay_budget,
        mode="fast" if job.model.mode == "fast" else "exact",
    )


def _sizes(job: Job, step_tokens: int, microbatches: int, budget: int, device: str) -> dict[str, int]:
    """What `memory.plan_memory` is told that does not depend on what fits."""
    return {
        "capacity": job.run.capacity,
        "max_step_tokens": step_tokens,
        "microbatches": microbatches,
        "arrival_budget": budget,
        "packed_head": device == "cpu",
        "gpu": device == "cuda",
        "trace_bytes": memory.trace_bytes(job.trace.level) if device == "cpu" else 0,
    }


@dataclass(frozen=True)
class _Fitting:
    """Places experts, chooses a route and plans memory, for so many positions of a home's KV cache."""

    job: Job
    config: ModelConfig
    nbytes: int
    n_ranks: int
    load: np.ndarray | None
    homes: Sequence[int]
    nodes: Nodes
    links: Links | None
    device: str
    steps: tuple[tuple[float, float], ...]
    relay_budget: int
    sizes: dict[str, Any]  # all that memory is planned with but the cache and relays
    gpu_bytes: int

    def __call__(self, kv_tokens: int) -> tuple[int, Placement, Route, list[memory.RankMemory]]:
        job, sizes = self.job, {**self.sizes, "kv_tokens": kv_tokens}
        # The placement needs a memory plan, and auto needs the placement: what it may choose is planned with.
        costliest = "leader" if job.exchange.route == "auto" and self.links is not None else job.exchange.route
        held = {**sizes, "relays": _relays(costliest, self.nodes, self.relay_budget)}
        placement = _placement(job, self.config, self.n_ranks, self.nbytes, self.load, held)
        route = _route(job, self.config, self.nbytes, placement, self.nodes, self.steps, self.links, self.device)
        relays = _relays(route.name, self.nodes, self.relay_budget)
        plans = memory.plan_memory(self.config, self.nbytes, placement, homes=self.homes, relays=relays, **sizes)
        source = "memory.limit" if job.memory.limit else "the memory of the GPU"
        memory.check_limit(plans, job.memory.limit or self.gpu_bytes, source)
        return kv_tokens, placement, route, plans


def _nodes(job: Job, n_ranks: int, found: Nodes | None) -> Nodes:
    if job.exchange.ranks_per_node == "auto":
        return found or one_node(n_ranks)
    return pretended(job.exchange.ranks_per_node, n_ranks)


def _relays(route: str, nodes: Nodes, budget: int) -> dict[int, int] | None:
    """Bytes that each relay gives to hops; None where there are none."""
    return memory.relay_bytes(Ways(route, nodes), budget) if route in RELAYED and nodes.n_nodes > 1 else None


def _route(
    job: Job,
    config: ModelConfig,
    nbytes: int,
    placement: Placement,
    nodes: Nodes,
    steps: tuple[tuple[float, float], ...],
    links: Links | None,
    device: str,
) -> Route:
    """The route of a job; a fast mode in which it would change nothing is refused.

    Raises:
        JobError: with the reason and the way out.
    """
    cut, row = bool(np.any(placement.hi - placement.lo < placement.leaves)), config.d_model
    work = Work(
        steps=steps,
        top_k=config.top_k,
        sent=row * nbytes,
        answered=row * answer_itemsize(cut, nbytes),
        summed=4 * row if job.model.mode == "fast" else 0,
    )
    wanted = job.exchange.route
    if device == "cuda":
        if wanted in RELAYED:
            raise JobError(f"exchange.route = {wanted!r} is for the CPU; on GPUs rows go straight: use 'direct'")
        wanted = "direct"
    route = choose_route(wanted, nodes, layer_tables(placement), work, links)
    if device == "cuda":
        return route
    if job.model.mode == "fast" and route.name not in RELAYED:
        raise JobError(
            "model.mode = 'fast' on the CPU is what relays do: it needs exchange.route = 'leader' or 'rail' and "
            f"several nodes, but the route of this job is direct ({route.reason}); use 'auto'"
        )
    return route


def check_tags(layout: Layout, n_layers: int, bound: int) -> None:
    """Hold the largest tag of a job against `MPI.TAG_UB`.

    Raises:
        FitError: with both numbers and the ways out.
    """
    largest = layout.tags.bound(n_layers)
    if largest > bound:
        raise FitError(
            f"{n_layers} layers x {layout.n_microbatches} microbatches x {layout.tags.n_pieces} pieces need message "
            f"tags up to {largest}; this MPI library takes {bound}: lower run.microbatches or raise "
            "exchange.piece_bytes"
        )


def _pieces(job: Job, config: ModelConfig, step_tokens: int, device: str) -> tuple[int, int]:
    """(pieces of the largest message, most rows of one); on a GPU a piece is one call of the experts at most."""
    row_bytes = 4 * config.d_model  # answers of cut experts are float32, whatever the model's dtype
    most = job.exchange.piece_bytes if device == "cpu" else min(job.exchange.piece_bytes, CALL_ROWS * row_bytes)
    return message_pieces(step_tokens * config.top_k, row_bytes, most)


def _microbatches(job: Job, config: ModelConfig, n_ranks: int, held: int, device: str) -> memory.Microbatches:
    if job.exchange.lockstep:
        return memory.Microbatches(1, 1)  # all ranks meet after every layer, so a rank can have one under way
    if job.run.microbatches == "auto":
        return memory.microbatches_auto(config, n_ranks, held, leaves=job.model.leaves, gpu=device == "cuda")
    return memory.Microbatches(job.run.microbatches, job.run.microbatches)


def _kv_tokens(job: Job, positions: Sequence[int]) -> tuple[int, int]:
    """Least and most positions of the cache: one of the longest sequences, and `capacity` of them; or as given.

    Raises:
        FitError: the longest sequence alone does not fit.
    """
    longest = -(-max(positions, default=1) // PAGE) * PAGE
    if job.memory.kv_tokens == "auto":
        return longest, min(job.run.capacity, max(1, len(positions))) * longest
    if job.memory.kv_tokens < longest:
        raise FitError(
            f"memory.kv_tokens = {job.memory.kv_tokens}, but the longest sequence needs {longest} positions "
            f"(in pages of {PAGE}): raise memory.kv_tokens or lower generate.max_new_tokens"
        )
    return job.memory.kv_tokens, job.memory.kv_tokens


def most_that_fits(least: int, most: int, attempt: Callable[[int], Fitted]) -> Fitted:
    """What `attempt` makes of the most positions, in whole pages from `least` to `most`, that it takes.

    Args:
        attempt: raises FitError where so many do not fit; then more do not either.

    Raises:
        FitError: not even `least` fit.
    """
    try:
        return attempt(most)
    except FitError:
        if least >= most:
            raise
    found, low, high = attempt(least), least, most  # low fits, high does not
    while high - low > PAGE:
        middle = low + (high - low) // (2 * PAGE) * PAGE
        try:
            found, low = attempt(middle), middle
        except FitError:
            high = middle
    return found


def _placement(
    job: Job, config: ModelConfig, n_ranks: int, nbytes: int, load: np.ndarray | None, held: dict[str, Any]
) -> Placement:
    options, leaves = job.placement, job.model.leaves
    if options.strategy == "file":
        assert options.file is not None
        placement = read_placement(options.file)
        fits(placement, config, n_ranks, leaves, options.file)
        check_strict(placement, options)
        return placement
    limit = memory.slots_within(job.memory.limit, config, nbytes, n_ranks=n_ranks, **held)
    return place(config, n_ranks, options, leaves, load, limit)
