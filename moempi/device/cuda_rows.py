"""Row kernels on the GPU, written for CuPy: what torch would do in several passes over memory, or not row by row.

Every kernel computes a row (or a token) by itself, in an order that follows from the row's length and dtype alone:
exact mode stands on that. Torch's reductions do not have it; they split a row by how many rows there are. All kernels
are compiled once per process and kept on disk by CuPy. They run on torch's current stream.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cupy
import torch
from torch import Tensor

from moempi.device import cuda_source, cuda_source_routes
from moempi.device.cuda_launch import Kernel, float_bits
from moempi.device.cuda_source import TOKENS
from moempi.device.cuda_source_routes import WORDS
from moempi.model.attention import AttentionPlan

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_WIDE = 16  # bytes that a thread moves at once, where rows are aligned to them


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [R, D], weight [D] float32 -> [R, D] in the dtype of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, d = x.shape
    if rows:
        wide = _whole_packs(d, _WIDE // x.itemsize, x, weight)
        values = [x.data_ptr(), weight.data_ptr(), out.data_ptr(), d, float_bits(eps)]
        _kernel(f"rms_norm<{_NAMES[x.dtype]}, {wide}>", 5)(rows, _threads(d // wide), values)
    return out


def add_norm(residual: Tensor, rows: Tensor, weight: Tensor, eps: float, total: Tensor, normed: Tensor) -> None:
    """Residual plus rows, both [T, D], into `total` [T, D], and its RMS norm into `normed` [T, D]; all of one dtype."""
    n, d = rows.shape
    if n:
        wide = _whole_packs(d, _WIDE // rows.itemsize, residual, rows, weight, total, normed)
        tensors = [t.data_ptr() for t in (residual, rows, weight, total, normed)]
        values = [*tensors, d, float_bits(eps)]
        _kernel(f"add_norm<{_NAMES[rows.dtype]}, {wide}>", 7)(n, _threads(d // wide), values)


def turn_heads(
    rows: Tensor,
    norm: Tensor,
    eps: float,
    tables: tuple[Tensor, Tensor],
    plan: AttentionPlan,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm and turn the heads of queries and keys by their positions; write keys and values into the cache.

    Args:
        rows: [T, (heads + 2 kv_heads) * head_dim], queries first, then keys, then values, in the cache's dtype.
        norm: [heads + kv_heads, head_dim] float32.
        tables: cosines and signed sines [positions, head_dim] float32 (`moempi.model.ops.Rotary`).
        plan: on the GPU.
        keys: [pages, kv_heads, width, PAGE], one layer of the cache.
        values: [pages, kv_heads, PAGE, width].

    Returns:
        Queries [T, heads, head_dim] in the cache's dtype, scaled by 1 / sqrt(head_dim) before they are rounded.
    """
    n, dim = rows.shape[0], norm.shape[1]
    kv_heads, page, width = values.shape[1:]
    heads = norm.shape[0] - kv_heads
    queries = torch.empty(n, heads, dim, dtype=rows.dtype, device=rows.device)
    assert rows.dtype == keys.dtype == values.dtype, "heads lie in the cache as they come"
    if n:
        # With more at once than four, the values of a thread fill its registers.
        wide = _whole_packs(dim // 2, 4, rows, norm, *tables, queries, keys, values)
        tensors = rows, norm, *tables, plan.positions, plan.write_pages, plan.write_offsets, queries, keys, values
        lanes = min(32, 1 << (dim // 2 // wide - 1).bit_length())  # for each head
        together = 32 // lanes
        blocks = -(-n // TOKENS) * (-(-heads // together) + 2 * -(-kv_heads // together))
        shape = n, heads, kv_heads, dim, width, page, lanes
        values_of = [*(t.data_ptr() for t in tensors), *shape, float_bits(eps), float_bits(dim**-0.5)]
        kernel = _kernel(f"turn_heads<{_NAMES[rows.dtype]}, {wide}>", 19)
        kernel(blocks, 32 * TOKENS, values_of, shared=4 * together * dim * (TOKENS + 1))
    return queries


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [R, 2F] contiguous, gate first -> g / (1 + exp(-g)) * u [R, F] in the same dtype."""
    rows, width = gate_up.shape
    out = torch.empty(rows, width // 2, dtype=gate_up.dtype, device=gate_up.device)
    swiglu_at(gate_up.data_ptr(), rows, width // 2, gate_up.dtype, out.data_ptr())
    return out


def swiglu_at(source: int, rows: int, f: int, dtype: torch.dtype, target: int) -> None:
    """The same, of rows [R, 2F] at one address into [R, F] at another."""
    if rows:
        wide = _wide(f, dtype.itemsize, source | target)
        _kernel(f"swiglu<{_NAMES[dtype]}, {wide}>", 3)(rows, _threads(f // wide), [source, target, f])


def gather(rows: Tensor, tokens: Tensor, out: int) -> None:
    """Row `tokens[r]` of rows [T, D] into row r of [R, D] at address `out`, in their dtype.

    Args:
        tokens: [R] int32.
    """
    n, d = tokens.shape[0], rows.shape[1]
    if n:
        source = rows.data_ptr()
        wide = _wide(d, rows.itemsize, source | out)
        values = [source, tokens.data_ptr(), out, d]
        _kernel(f"gather<{_NAMES[rows.dtype]}, {wide}>", 4)(n, _threads(d // wide), values)


def scatter(rows: Tensor, places: Tensor, out: int) -> None:
    """Row t of rows [T, D] into rows `places[t]` of [R, D] at address `out`, in their dtype.

    Args:
        places: [T, K] int32; -1 where a row goes nowhere.
    """
    t, d = rows.shape
    if t:
        source = rows.data_ptr()
        wide = _wide(d, rows.itemsize, source | out)
        values = [source, places.data_ptr(), out, places.shape[1], d]
        _kernel(f"scatter<{_NAMES[rows.dtype]}, {wide}>", 5)(t, _threads(d // wide), values)


def combine(x: Tensor, answers: Tensor, places: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Residual x [T, D] plus the weighted answers of each token: k ascending, float32, rounded once.

    Args:
        answers: [R, D], in the model's dtype or in float32.
        places: [T, K] int32, row of the answer to every (token, k); -1 where a token has none, which stays as it was.
        weights: [T, K] float32.
        out: [T, D] for what comes out.
    """
    out = torch.empty_like(x) if out is None else out
    t, d = x.shape
    if t:
        a, b, c = x.data_ptr(), answers.data_ptr(), out.data_ptr()
        wide = _wide(d, max(x.itemsize, answers.itemsize), a | b | c)
        values = [a, b, places.data_ptr(), weights.data_ptr(), c, places.shape[1], d]
        name = f"combine<{_NAMES[x.dtype]}, {_NAMES[answers.dtype]}, {wide}>"
        _kernel(name, 7)(t, _threads(d // wide), values)
    return out


def choose_experts(
    logits: Tensor, top_k: int, normalize: bool, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax of logits [T, E] float32, then the K best [T, K] int32 with their weights [T, K] float32.

    Equal scores go to the lowest index.

    Args:
        weights: [T, K] that the weights are written into; by default new.
    """
    t, e = logits.shape
    experts = torch.empty(t, top_k, dtype=torch.int32, device=logits.device)
    if weights is None:
        weights = torch.empty(t, top_k, dtype=torch.float32, device=logits.device)
    if t:
        warps = 4 if e <= 2048 else 1
        values = [logits.data_ptr(), experts.data_ptr(), weights.data_ptr(), t, e, top_k, int(normalize)]
        _kernel("choose", 7)(-(-t // warps), 32 * warps, values, shared=4 * e * warps)
    return experts, weights


class Headers(NamedTuple):
    """Headers of messages, which the sort of a dispatch's pairs writes ahead of the rows of each rank.

    Args:
        table: [covers, 3] int32, on the GPU: the first cover of its rank, rows of all headers up to that rank's own,
            bytes of that one, which end where the rows of the rank begin.
        packed: address of the rows.
        row: bytes of one.
    """

    table: Tensor
    packed: int
    row: int


def sort_pairs(
    experts: Tensor,
    turns: Tensor,
    cover_of: Tensor,
    n_replicas: Tensor,
    layer: int,
    counts: Tensor,
    places: Tensor,
    headers: Headers | None = None,
    tokens: Tensor | None = None,
) -> None:
    """Sort the pairs (token, k) by cover, keeping their order within one; replicas take turns by (turn + layer).

    Args:
        experts: [T, K] int32.
        turns: [T] int64, sequence + position of every token; -1 for padding, which has no cover.
        cover_of: [E, most replicas] int32.
        n_replicas: [E] int32.
        counts: [covers] int64, on the GPU or in pinned memory of the host: gets the pairs of every cover.
        places: [T, K] int32: gets where each pair is among them, the rows of headers counted; -1 of padding.
        headers: where rows leave with them.
        tokens: [T * K] int32: gets the token of every pair by ascending cover, where there are no headers.
    """
    n, (_, top_k) = experts.numel(), experts.shape
    inputs = experts.data_ptr(), turns.data_ptr(), cover_of.data_ptr(), n_replicas.data_ptr()
    outputs = 0 if tokens is None else tokens.data_ptr(), places.data_ptr(), counts.data_ptr()
    about_headers = (headers.table.data_ptr(), headers.packed, headers.row) if headers else (0, 0, 0)
    values = [*inputs, *outputs, n, top_k, cover_of.shape[1], layer, *about_headers]
    _kernel("sort_pairs", 14)(counts.shape[0], 1024, values)


def row_tables(
    batches: list[int] | int,
    tiles: int,
    inward: int,
    outward: int,
    room: int,
    shape: tuple[int, int],
    tile: int,
    row: int,
) -> None:
    """Which rows meet which weights in the two products of an expert call, slot by slot (`cuda_products.Tiles`).

    Args:
        batches: [B * 3]: where a batch's rows begin, where its outputs do, and the address of its rows for every slot,
            int32 [S]; of one slot their number itself. Where they are more than `WORDS`, the address of int64 [B, 3].
        tiles: address of int64 [room, 3].
        inward, outward: addresses of int64 [R]: of every row, slot by slot, where it is and where its output goes.
        room: tiles, at least as many as there are; the rest are empty.
        shape: B and S.
        tile: rows of a tile.
        row: length of one, in the unit of all places.
    """
    in_memory, taken_along = (batches, []) if isinstance(batches, int) else (0, batches)
    values = [in_memory, tiles, inward, outward, room, *shape, tile, row, *taken_along]
    _kernel("row_tables", 10, WORDS)(shape[0] * shape[1], 128, values)


def greedy(
    logits: Tensor, out: tuple[Tensor, Tensor] | None = None, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Best token [S] int64, lowest id among equals, and its log-probability [S] float32, of logits [S, V] float32.

    The log-probability is not a number where a score is not finite: who reads it has to look.

    Args:
        out: both, on the GPU or in pinned memory of the host.
        copy: [S] int64, that the tokens are written into as well.
    """
    s, v = logits.shape
    tokens, logprobs = out or (
        torch.empty(s, dtype=torch.int64, device=logits.device),
        torch.empty(s, dtype=torch.float32, device=logits.device),
    )
    if s:
        addresses = [logits.data_ptr(), tokens.data_ptr(), 0 if copy is None else copy.data_ptr(), logprobs.data_ptr()]
        _kernel("greedy", 5)(s, 1024, [*addresses, v])
    return tokens, logprobs


# ---------------------------------------------------------------- launching


@cache
def _kernel(name: str, n_parameters: int, words: int = 1) -> Kernel:
    return Kernel(_module().get_function(name), n_parameters, words)


@cache
def _module() -> cupy.RawModule:
    # No fast mathematics and no contraction: a product and a sum round as written, as on the CPU.
    return cupy.RawModule(code=source(), options=("--std=c++17", "--fmad=false"), name_expressions=names())


def source() -> str:
    """The CUDA C++ of all kernels."""
    return cuda_source.SOURCE + cuda_source_routes.SOURCE


def names() -> list[str]:
    """All kernels, of templates the instances that are used."""
    types = _NAMES.values()
    found = ["choose", "sort_pairs", "row_tables", "greedy"]
    for wide_float, wide_bf16 in ((4, 8), (1, 1)):
        wide = {"float": wide_float, "bf16": wide_bf16}
        by_dtype = "rms_norm", "add_norm", "swiglu", "gather", "scatter"
        found += [f"{kernel}<{t}, {wide[t]}>" for kernel in by_dtype for t in types]
        found += [f"combine<{t}, {t}, {wide[t]}>" for t in types]
        found += [f"turn_heads<{t}, {wide_float}>" for t in types]
    return [*found, "combine<bf16, float, 4>", "combine<bf16, float, 1>"]


def _wide(d: int, itemsize: int, addresses: int) -> int:
    """Elements that a thread moves at once: 16 bytes of the largest type where all rows are aligned to them, else one.

    Args:
        itemsize: of the largest type.
        addresses: of all tensors, or-ed.
    """
    n = _WIDE // itemsize
    return n if d % n == 0 and addresses % _WIDE == 0 else 1


def _whole_packs(d: int, pack: int, *tensors: Tensor) -> int:
    """Elements that a thread moves at once: a pack where D is whole ones, else one.

    They order the sums of a row, so they follow from D and its dtype: memory that does not fit is a fault.
    """
    if d % pack:
        return 1
    assert all(t.data_ptr() % _WIDE == 0 for t in tensors), "rows of whole packs begin with one"
    return pack


def _threads(chunks: int) -> int:
    return min(256, -(-chunks // 32) * 32)
