"""What a rank holds on a GPU that it would not on a CPU, before the job starts, and what it was in the end.

Letters: T tokens of a microbatch, D model dim, F expert hidden, E experts, K experts per token, H hidden of a dense
layer. Whatever is not a shape was measured on an H200 with CUDA 13; the GPU's tests hold the sum against the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.device.arena import aligned
from moempi.model.config import ModelConfig

# CUDA's own, a little more than was seen: context and code of kernels.
CONTEXT = 704 * 2**20
# Of the host: a process with torch, CUDA, MPI and the kernels that it has compiled. 1.4 GB were seen.
HOST = 3 * 2**29
# torch's allocator takes memory in segments, which are not filled to the end.
_SEGMENTS = 48 * 2**20
STEADY = 512  # sequences, up to which a step of one token each is launched as graphs
ROUND = 16  # to a multiple of which their number is padded
GRAPH_SHAPES = 12  # of a microbatch whose graphs are kept
CALL_ROWS = 65536  # most rows of an expert call, and of a message: they are computed whole
ROUND_ROWS = 512  # steps of the room that a recorded expert call has for its rows
FRAMES_POSTED = 4
_LEAST_FRAME = 64  # rows that a frame has room for, however many ranks there are
_FLOAT32 = 4


def step_bytes(
    config: ModelConfig,
    dtype_bytes: int,
    *,
    n_ranks: int,
    capacity: int,
    max_step_tokens: int,
    microbatches: int,
    arrival_budget: int,
) -> int:
    """Most that activations take: three rows per token of every microbatch, one stage of one, an expert call, logits.

    The three are what goes into a layer, the same with attention added, and that normalised for the experts.

    Nothing is sliced on a GPU: a stage has all tokens of a microbatch.
    """
    d, t = config.d_model, max_step_tokens
    resident = microbatches * t * 3 * d * dtype_bytes
    logits = min(capacity, t) * config.vocab * (dtype_bytes + _FLOAT32)
    rows = call_rows(config, dtype_bytes, n_ranks, microbatches, t, arrival_budget)
    # What comes out of both products of an expert, and two places of every row, in a table twice as large as need be.
    call = rows * (3 * config.expert_hidden * dtype_bytes + 2 * 2 * 8)
    stage = _stage_bytes(config, dtype_bytes)
    # Steps of one token of each sequence have memory of their own, and their graphs a stage of theirs.
    steady = microbatches * steady_rows(capacity) * (3 * d * dtype_bytes + stage + _routes(config))
    return resident + t * stage + steady + call + logits + _tables(config) + _SEGMENTS


def host_bytes(config: ModelConfig, dtype_bytes: int, message_bytes: int, gpu_aware: str) -> int:
    """Bytes of its host's memory that a rank on a GPU takes, but for a trace: few, but for rows that pass through it.

    Args:
        message_bytes: of the rank's plan.
        gpu_aware: the option of the job; only "on" is known to stage nothing before the job starts.
    """
    d, heads = config.d_model, config.n_heads + 2 * config.n_kv_heads
    largest = d * max(config.vocab, heads * config.head_dim, 3 * config.expert_hidden, 2 * config.dense_hidden)
    read = largest * (_FLOAT32 + dtype_bytes)  # as it is stored, and in the run's dtype
    return HOST + read + (message_bytes if gpu_aware != "on" else 0)


def steady_rows(capacity: int) -> int:
    """Rows that the steady steps of a microbatch have memory for, where it holds up to `capacity` sequences."""
    return min(STEADY, -(-capacity // ROUND) * ROUND)


def steady_message_rows(config: ModelConfig, dtype_bytes: int, capacity: int, n_ranks: int) -> int:
    """Rows that a microbatch's steady steps send at most, with those that headers take among them."""
    return steady_rows(capacity) * config.top_k + n_ranks * header_rows(config, dtype_bytes)


def steady_message_bytes(config: ModelConfig, dtype_bytes: int, capacity: int, n_ranks: int) -> int:
    """Rows of a microbatch's steady steps and the room for their answers, which are kept beside those of prefill."""
    return 2 * steady_message_rows(config, dtype_bytes, capacity, n_ranks) * config.d_model * dtype_bytes


def header_rows(config: ModelConfig, dtype_bytes: int) -> int:
    """Rows among which the header of a frame, four bytes for every slot in whole lines of 64, has room."""
    return -(-_header_bytes(config) // (config.d_model * dtype_bytes))


def largest_frame(config: ModelConfig, dtype_bytes: int, capacity: int, n_ranks: int) -> int:
    """Bytes of the largest frame and its answer: twice as many rows as an even steady step has for each rank."""
    rows = steady_rows(capacity) * config.top_k
    most = min(rows, max(_LEAST_FRAME, 2 * -(-rows // n_ranks))) * config.d_model * dtype_bytes
    return aligned(_header_bytes(config) + most) + aligned(most)


def frames_posted(n_ranks: int) -> int:
    """Receives that are there before their frames: one for each rank that may send some, up to a few."""
    return min(FRAMES_POSTED, n_ranks - 1)


def frame_bytes(config: ModelConfig, dtype_bytes: int, capacity: int, n_ranks: int) -> int:
    """Memory of frames, where any are sent: room for those that are posted, and two of each other rank."""
    rooms = frames_posted(n_ranks) + 2 * (n_ranks - 1)
    return rooms * largest_frame(config, dtype_bytes, capacity, n_ranks)


def _header_bytes(config: ModelConfig) -> int:
    return 64 + 4 * config.n_experts


def _stage_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes per token of the widest stage, with the rows that it makes."""
    d, queries = config.d_model, config.n_heads * config.head_dim
    # Projections, queries that are turned, and what attention mixes.
    attention = (3 * queries + 2 * config.n_kv_heads * config.head_dim) * dtype_bytes
    dense = 3 * config.dense_hidden * dtype_bytes if config.dense_layers else 0
    gate = config.n_experts * _FLOAT32 if config.moe_layers else 0
    return max(attention, dense, gate) + 2 * d * dtype_bytes


def _routes(config: ModelConfig) -> int:
    """Bytes per token of routes, 4 each: experts of every layer and shape, places and weights of the step."""
    return (GRAPH_SHAPES * len(config.moe_layers) + 2) * config.top_k * _FLOAT32


def room_of(rows: int) -> int:
    """Rows that a recorded expert call is made for: those that it has, and more that nobody reads.

    Sequences by the sixteen that choose evenly among experts make rows around multiples of a power of two: rooms end
    half a step beyond, so that calls of steps that follow each other have one room, and are recorded once.
    """
    return ROUND_ROWS * -(-(rows - ROUND_ROWS // 2) // ROUND_ROWS) + ROUND_ROWS // 2


def usual_rows(room: int) -> int:
    """Rows that an expert call with a room has: the middle of what gets this room."""
    return room - min(ROUND_ROWS, room) // 2


def call_rows(
    config: ModelConfig, dtype_bytes: int, n_ranks: int, microbatches: int, max_step_tokens: int, arrival_budget: int
) -> int:
    """Rows that there is memory for between the products of an expert call: all there can be, or those that have room.

    Args:
        dtype_bytes: of the rows.
        microbatches: of a rank.
        arrival_budget: bytes of rows and answers.
    """
    if not config.moe_layers:
        return 0
    sent = microbatches * max_step_tokens * config.top_k
    here = arrival_budget // (2 * config.d_model * dtype_bytes) + sent
    return min(CALL_ROWS, n_ranks * sent, here) + ROUND_ROWS


def _tables(config: ModelConfig) -> int:
    """Sines and cosines of every position."""
    return 2 * config.max_positions * config.head_dim * _FLOAT32


@dataclass(frozen=True)
class Use:
    """What a rank saw of its GPU at the end, in bytes."""

    gpu: str  # host and number: ranks may share one
    used: int  # of the GPU, by whomever
    reserved: int  # by this rank's allocator, now
    peak: int  # the same at its highest


def peaks(uses: Sequence[Use]) -> list[int]:
    """Most bytes that every rank took: its allocator's peak, and its part of what allocators do not know of.

    That part, CUDA's own, is what is used of a GPU beyond the allocators of the ranks on it, divided among them.
    """
    found = []
    for use in uses:
        together = [one for one in uses if one.gpu == use.gpu]
        own = max(one.used for one in together) - sum(one.reserved for one in together)
        found.append(use.peak + max(0, own) // len(together))
    return found
