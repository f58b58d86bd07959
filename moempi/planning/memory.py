"""What every rank will hold in bytes, before the job starts.

Letters: T tokens of a microbatch, D model dim, F expert hidden, E experts, K experts per token, L MoE layers.
Weights, KV cache and messages are counted from shapes; `step_bytes` is an upper estimate. Memory of the
interpreter and of the MPI library is not in the plan; on a GPU, whose memory it is then all about, CUDA's own is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moempi.errors import FitError
from moempi.exchange.relay_plan import Ways
from moempi.exchange.relay_wire import ALIGNED
from moempi.model.config import PAGE, ModelConfig, is_small_expert, padded_head
from moempi.planning import gpu_memory
from moempi.planning.placement import COLUMNS, Placement
from moempi.recorder import PART_BYTES, PARTS_HELD

_WAYS_OUT = "lower run.capacity, memory.kv_tokens, run.prefill_tokens or exchange.arrival_budget, or raise memory.limit"
# Combined in float32, and so are the pieces of a cut expert returned.
_FLOAT32 = 4
# Below this many rows an expert call is bound by reading the weights, and a second microbatch reads them twice.
_ROWS_FOR_TWO, _ROWS_FOR_TWO_ON_GPU = 64, 128
# Microbatches that keep a rank busy in prefill: one computes, others are on their way.
_PREFILLING, _PREFILLING_ON_GPU = 2, 3


@dataclass(frozen=True)
class RankMemory:
    """The plan of one rank, in bytes but for `rank` and `slots` (over all layers)."""

    rank: int
    slots: int
    shared_bytes: int  # what every rank holds of the model: all weights but the experts'
    expert_bytes: int  # weights of its slots
    kv_bytes: int
    message_bytes: int  # arrivals and their answers, and the rows that its microbatches send and await
    step_bytes: int  # activations, at most
    context_bytes: int = 0  # what CUDA takes for itself
    trace_bytes: int = 0  # notes of the trace on their way to the disk

    @property
    def total(self) -> int:
        """Sum of all parts in bytes."""
        parts = (self.shared_bytes, self.expert_bytes, self.kv_bytes, self.message_bytes, self.step_bytes)
        return sum(parts) + self.context_bytes + self.trace_bytes


def plan_memory(
    config: ModelConfig,
    dtype_bytes: int,
    placement: Placement,
    *,
    capacity: int,
    kv_tokens: int,
    max_step_tokens: int,
    microbatches: int,
    arrival_budget: int,
    homes: Collection[int] | None = None,
    packed_head: bool = False,
    relays: Mapping[int, int] | None = None,
    gpu: bool = False,
    trace_bytes: int = 0,
) -> list[RankMemory]:
    """The plan of every rank, in order of rank.

    Args:
        dtype_bytes: size of one weight or activation.
        capacity: sequences that a home works on at the same time.
        kv_tokens: positions in a home's KV cache.
        max_step_tokens: most tokens of a microbatch, T.
        arrival_budget: bytes for received rows and their answers, as `arrival_budget` returns it.
        homes: ranks that are homes; None: all. Others hold no KV cache and send no rows of their own.
        packed_head: tied heads share the embedding's memory, but exact products on the CPU keep a packed copy;
            True counts it.
        relays: bytes that each relay gives to hops; None: rows go straight to their ranks. Where there are relays,
            homes pack rows for them, and receive what they bring, beside their own.
        gpu: it is the memory of GPUs.
        trace_bytes: as of `trace_bytes`.
    """
    shared = shared_bytes(config, dtype_bytes, packed_head, gpu=gpu)
    kv = kv_bytes(config, dtype_bytes, kv_tokens + PAGE * gpu)  # a GPU has a page for padding
    own = microbatches * home_message_bytes(config, dtype_bytes, max_step_tokens, placement)
    own *= 1 if relays is None else 2
    step, frames = step_bytes(config, dtype_bytes, capacity, max_step_tokens, microbatches), 0
    if gpu:
        sizes = {"capacity": capacity, "max_step_tokens": max_step_tokens, "microbatches": microbatches}
        n_ranks, of_steady = placement.n_ranks, (config, dtype_bytes, capacity, placement.n_ranks)
        step = gpu_memory.step_bytes(config, dtype_bytes, n_ranks=n_ranks, arrival_budget=arrival_budget, **sizes)
        own += microbatches * gpu_memory.steady_message_bytes(*of_steady)
        if placement.leaves == 1 and config.moe_layers:  # at most: rows that are staged are not sent so
            frames = gpu_memory.frame_bytes(*of_steady)
    slots, experts = _slots_of_ranks(config, dtype_bytes, placement)
    home = [homes is None or rank in homes for rank in range(placement.n_ranks)]
    return [
        RankMemory(
            rank=rank,
            slots=int(slots[rank]),
            shared_bytes=shared,
            expert_bytes=int(experts[rank]),
            kv_bytes=kv * home[rank],
            message_bytes=arrival_budget + frames + own * home[rank] + (relays or {}).get(rank, 0),
            step_bytes=step,
            context_bytes=gpu_memory.CONTEXT if gpu else 0,
            trace_bytes=trace_bytes,
        )
        for rank in range(placement.n_ranks)
    ]


def _slots_of_ranks(config: ModelConfig, dtype_bytes: int, placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """(slots, bytes of their weights) of every rank, int64 [N] each."""
    hidden = np.arange(placement.leaves + 1, dtype=np.int64) * config.expert_hidden // placement.leaves
    nbytes = 3 * config.d_model * dtype_bytes * (hidden[placement.hi] - hidden[placement.lo])
    held = np.zeros(placement.n_ranks, dtype=np.int64)
    np.add.at(held, placement.rank, nbytes)
    return np.bincount(placement.rank, minlength=placement.n_ranks), held


# ---------------------------------------------------------------- the parts


def shared_bytes(config: ModelConfig, dtype_bytes: int, packed_head: bool = False, *, gpu: bool = False) -> int:
    """Embedding, head, attention, dense layers, gates; norms in float32. A tied head counts only if packed.

    Args:
        gpu: gates are kept in the model's dtype, not in float32.
    """
    d, heads, head_dim = config.d_model, config.n_heads, config.head_dim
    vocab = config.vocab * d * (1 if config.tied_embeddings and not packed_head else 2)
    attention = 2 * d * (heads + config.n_kv_heads) * head_dim  # q and o, k and v
    dense = len(config.dense_layers) * 3 * d * config.dense_hidden
    norms = config.n_layers * 2 * (d + head_dim) + d
    gates = len(config.moe_layers) * config.n_experts * d
    weights = (vocab + config.n_layers * attention + dense) * dtype_bytes
    return weights + norms * _FLOAT32 + gates * (dtype_bytes if gpu else _FLOAT32)


def slot_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Weights of one whole expert."""
    return 3 * config.d_model * config.expert_hidden * dtype_bytes


def kv_bytes(config: ModelConfig, dtype_bytes: int, kv_tokens: int) -> int:
    """Keys and values of `kv_tokens` positions in all layers, rounded up to whole pages."""
    positions = -(-kv_tokens // PAGE) * PAGE
    return 2 * config.n_layers * config.n_kv_heads * padded_head(config.head_dim) * dtype_bytes * positions


def home_message_bytes(
    config: ModelConfig, dtype_bytes: int, max_step_tokens: int, placement: Placement | None = None
) -> int:
    """Rows that one microbatch sends, and the room for their answers; without a placement experts are whole."""
    rows, answer = config.top_k, dtype_bytes
    if placement is not None and _is_cut(placement):
        rows, answer = _rows_per_token(placement, config.top_k), max(dtype_bytes, _FLOAT32)
    return max_step_tokens * rows * config.d_model * (dtype_bytes + answer)


def _is_cut(placement: Placement) -> bool:
    return bool(np.any(placement.hi - placement.lo < placement.leaves))


def _rows_per_token(placement: Placement, top_k: int) -> int:
    """Most rows that a token sends in a layer: one to each piece of its experts."""
    slots = np.stack([placement.layer, placement.expert, placement.replica])
    replicas, pieces = np.unique(slots, axis=1, return_counts=True)
    most = np.zeros((len(placement.layers), placement.n_experts), dtype=np.int64)
    np.maximum.at(most, (np.searchsorted(placement.layers, replicas[0]), replicas[1]), pieces)
    return int(np.sort(most, axis=1)[:, -top_k:].sum(axis=1).max())


def step_bytes(config: ModelConfig, dtype_bytes: int, capacity: int, max_step_tokens: int, microbatches: int) -> int:
    """Most that activations take: the residual stream of every microbatch, the widest stage of one, and logits."""
    attention = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    dense = 3 * config.dense_hidden if config.dense_layers else 0
    expert = 3 * config.top_k * config.expert_hidden if config.moe_layers else 0
    widest = (max(attention, dense, expert) + 2 * config.d_model) * _FLOAT32
    logits = min(capacity, max_step_tokens) * config.vocab * _FLOAT32
    return max_step_tokens * (microbatches * config.d_model * dtype_bytes + widest) + logits


# ---------------------------------------------------------------- messages


def header_bytes(config: ModelConfig) -> int:
    """Room for the header of a message: at most one count for every expert."""
    return 64 + 8 * config.n_experts


def largest_message(config: ModelConfig, dtype_bytes: int, max_step_tokens: int) -> int:
    """Bytes of the largest dispatch: all rows of a microbatch to one rank that holds K of the layer's experts."""
    return header_bytes(config) + max_step_tokens * config.top_k * config.d_model * dtype_bytes


def arrival_budget(option_bytes: int, config: ModelConfig, dtype_bytes: int, max_step_tokens: int) -> int:
    """`exchange.arrival_budget`, raised to one largest message and its answer (float32, as of a cut expert)."""
    answer = max_step_tokens * config.top_k * config.d_model * max(dtype_bytes, _FLOAT32)
    return max(option_bytes, largest_message(config, dtype_bytes, max_step_tokens) + answer)


def relay_budget(option_bytes: int, config: ModelConfig, dtype_bytes: int, max_step_tokens: int) -> int:
    """`exchange.relay_budget`, raised to what one largest parcel holds while it is spread: rows, answers, returns."""
    rows = max_step_tokens * config.top_k * config.d_model
    lists = ALIGNED * 4 + 4 * (2 * config.n_experts + 2 * max_step_tokens * config.top_k)
    return max(option_bytes, lists + rows * (dtype_bytes + 3 * _FLOAT32))


def relay_bytes(ways: Ways, budget: int) -> dict[int, int]:
    """Bytes that each relay gives to hops: a budget for every kind, of which a rail collects nothing."""
    kinds = 3 if ways.route == "rail" else 4
    return {rank: kinds * budget for rank in range(ways.nodes.n_ranks) if ways.is_relay(rank)}


class Microbatches(NamedTuple):
    """How many a rank has in flight."""

    n: int
    decoding: int  # of them take the sequences that have one token to go in a step


def microbatches_auto(
    config: ModelConfig, n_ranks: int, capacity: int, *, leaves: int = 1, gpu: bool = False
) -> Microbatches:
    """For `run.microbatches` = "auto".

    With few rows an expert call takes as long as reading the weights, so that two calls take twice as long: in decode
    there are 2 where the mean call has rows enough, else 1. In prefill there are rows enough, and one microbatch's
    messages, on a GPU the host's time too, pass under what another one computes; but calls of small experts on a CPU
    cost mostly Python, and two microbatches make twice as many.
    """
    rows = capacity * config.top_k * n_ranks / config.n_experts
    decoding = 1 if n_ranks == 1 or rows < (_ROWS_FOR_TWO_ON_GPU if gpu else _ROWS_FOR_TWO) else 2
    alone_or_small = n_ranks == 1 or is_small_expert(-(-config.expert_hidden // leaves), config.d_model)
    prefilling = _PREFILLING_ON_GPU if gpu else 1 if alone_or_small else _PREFILLING
    return Microbatches(max(decoding, min(prefilling, capacity)), decoding)


# ---------------------------------------------------------------- limits


def check_limit(plans: list[RankMemory], limit: int, source: str = "memory.limit") -> None:
    """Hold `memory.limit` (bytes per rank; 0: not checked).

    Args:
        source: what the limit is, where it is not that option.

    Raises:
        FitError: naming the fullest rank, its parts and the limit.
    """
    worst = max(plans, key=lambda plan: plan.total)
    if limit and worst.total > limit:
        over = sum(plan.total > limit for plan in plans)
        raise FitError(
            f"{source} = {show_bytes(limit)}: rank {worst.rank} needs {show_bytes(worst.total)} "
            f"({_parts(worst)}), and {over} of {len(plans)} ranks need more than the limit; use more ranks, {_WAYS_OUT}"
        )


def _parts(plan: RankMemory) -> str:
    parts = {
        "shared weights": plan.shared_bytes,
        f"{plan.slots} slots": plan.expert_bytes,
        "KV cache": plan.kv_bytes,
        "messages": plan.message_bytes,
        "activations": plan.step_bytes,
    }
    parts |= {"CUDA's own": plan.context_bytes} if plan.context_bytes else {}
    parts |= {"trace": plan.trace_bytes} if plan.trace_bytes else {}
    return ", ".join(f"{name} {show_bytes(size)}" for name, size in parts.items())


def trace_bytes(level: str) -> int:
    """Most bytes that a rank holds of its trace: a part that grows, and those that are not on the disk yet.

    Counters, which are all that there is below level full, take next to nothing.
    """
    return PARTS_HELD * PART_BYTES if level in ("full", "routes") else 0


def slots_within(
    limit: int,
    config: ModelConfig,
    dtype_bytes: int,
    *,
    capacity: int,
    kv_tokens: int,
    max_step_tokens: int,
    microbatches: int,
    arrival_budget: int,
    packed_head: bool = False,
    relays: Mapping[int, int] | None = None,
    gpu: bool = False,
    trace_bytes: int = 0,
    n_ranks: int = 1,
) -> int | None:
    """Most whole experts, over all layers, that fit a home rank: the `slot_limit` of `place`. None: no limit.

    Raises:
        FitError: what is not experts does not fit already.
    """
    if not limit:
        return None
    none = np.zeros(0, dtype=np.int32)
    bare = Placement.from_slots(n_ranks, config.n_experts, 1, (), dict.fromkeys(COLUMNS, none))
    rest = plan_memory(
        config,
        dtype_bytes,
        bare,
        capacity=capacity,
        kv_tokens=kv_tokens,
        max_step_tokens=max_step_tokens,
        microbatches=microbatches,
        arrival_budget=arrival_budget,
        packed_head=packed_head,
        relays=None if relays is None else {0: max(relays.values(), default=0)},
        gpu=gpu,
        trace_bytes=trace_bytes,
    )[0]
    if rest.total > limit:
        raise FitError(
            f"memory.limit = {show_bytes(limit)}: without any expert a home rank needs {show_bytes(rest.total)} "
            f"({_parts(rest)}); {_WAYS_OUT}"
        )
    return (limit - rest.total) // slot_bytes(config, dtype_bytes)


def show_bytes(count: int) -> str:
    """Bytes in a unit that a reader takes in: 512 B, 1.5 KiB, 12.0 GiB."""
    if count < 1024:
        return f"{count} B"
    unit = min(3, int(math.log(count * 1.00005, 1024)))  # 1023.96 KiB is shown as 1.0 MiB
    return f"{count / 1024**unit:.1f} {('', 'KiB', 'MiB', 'GiB')[unit]}"
