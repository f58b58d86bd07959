"""Row kernels on the GPU, written for CuPy: what torch would do in several passes over memory, or not row by row.

Every kernel computes a row (or a token) by itself, in an order that depends on the row's own length alone: exact mode
stands on that. Torch's reductions do not have it; they split a row by how many rows there are. All kernels are
compiled once per process and kept on disk by CuPy. They run on torch's current stream.
"""

from __future__ import annotations

from functools import cache

import cupy
import numpy as np
import torch
from torch import Tensor

from moempi.device.cuda_source import SOURCE

_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}
_WIDE = 16  # bytes that a thread moves at once, where rows are aligned to them


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., D], weight [D] or [H, D] float32 (row r takes weight r modulo H) -> [..., D] in `dtype`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    d = x.shape[-1]
    rows = x.numel() // d
    if rows:
        # The number of threads is part of the order of the sum: it follows from D alone.
        threads = 32 if d <= 256 else 256
        name = f"rms_norm<{_NAMES[x.dtype]}, {_NAMES[dtype]}>"
        _launch(name, rows, threads, x, weight, out, weight.numel() // d, d, np.float32(eps))
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [R, 2F] contiguous, gate first -> g / (1 + exp(-g)) * u [R, F] in the same dtype."""
    rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, f, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        wide = _wide(f, gate_up, out)
        _launch(f"swiglu<{_NAMES[gate_up.dtype]}, {wide}>", rows, _threads(f // wide), gate_up, out, f)
    return out


def gather(rows: Tensor, pairs: Tensor, top_k: int, out: Tensor) -> None:
    """Row `pairs[r] // top_k` of rows [T, D] into row r of out [R, D]; pairs [R] int32."""
    if len(pairs):
        d = rows.shape[1]
        wide = _wide(d, rows, out)
        _launch(f"gather<{_NAMES[rows.dtype]}, {wide}>", len(pairs), _threads(d // wide), rows, pairs, out, top_k, d)


def combine(x: Tensor, answers: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Residual x [T, D] plus the weighted answers of each token: k ascending, float32, rounded once.

    Args:
        answers: [R, D], in the model's dtype or in float32.
        places: [T, K] int32, row of the answer to every (token, k).
        weights: [T, K] float32.
    """
    out = torch.empty_like(x)
    t, d = x.shape
    if t:
        wide = _wide(d, x, answers, out)
        name = f"combine<{_NAMES[x.dtype]}, {_NAMES[answers.dtype]}, {wide}>"
        _launch(name, t, _threads(d // wide), x, answers, places, weights, out, places.shape[1], d)
    return out


def choose_experts(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax of logits [T, E] float32, then the K best [T, K] int32 with their weights [T, K] float32.

    Equal scores go to the lowest index.
    """
    t, e = logits.shape
    experts = torch.empty(t, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(t, top_k, dtype=torch.float32, device=logits.device)
    if t:
        warps = 4 if e <= 2048 else 1
        args = (logits, experts, weights, t, e, top_k, int(normalize))
        _launch("choose", -(-t // warps), 32 * warps, *args, shared=4 * e * warps)
    return experts, weights


def choose_covers(experts: Tensor, turns: Tensor, cover_of: Tensor, n_replicas: Tensor, layer: int) -> Tensor:
    """Covers [T, K] int32 of experts [T, K]: replicas take turns by (turn + layer).

    Args:
        turns: [T] int64, sequence + position of every token.
        cover_of: [E, most replicas] int32.
        n_replicas: [E] int32.
    """
    covers = torch.empty_like(experts)
    n = experts.numel()
    if n:
        args = (experts, turns, cover_of, n_replicas, covers, n, experts.shape[1], cover_of.shape[1], layer)
        _launch("choose_covers", -(-n // 256), 256, *args)
    return covers


def sort_pairs(covers: Tensor, n_covers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs (token, k) by cover, keeping their order within one.

    Returns:
        pairs [T * K] int32 by ascending cover, places [T, K] int32 (where each pair is among them), and counts
        [n_covers] int64.
    """
    pairs = torch.empty(covers.numel(), dtype=torch.int32, device=covers.device)
    places = torch.empty_like(covers)
    counts = torch.zeros(n_covers, dtype=torch.int64, device=covers.device)
    if covers.numel():
        _launch("sort_pairs", n_covers, 1024, covers, pairs, places, counts, covers.numel())
    return pairs, places, counts


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Best token [S] int64, lowest id among equals, and its log-probability [S] float32, of logits [S, V] float32.

    The log-probability is not a number where a score is not finite: who reads it has to look.
    """
    s, v = logits.shape
    tokens = torch.empty(s, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(s, dtype=torch.float32, device=logits.device)
    if s:
        _launch("greedy", s, 1024, logits, tokens, logprobs, v)
    return tokens, logprobs


# ---------------------------------------------------------------- launching


def _launch(name: str, blocks: int, threads: int, *args: Tensor | int | np.float32, shared: int = 0) -> None:
    values = tuple(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
    # The pointer straight from torch: `current_stream` makes an object for it, which takes as long as the launch.
    with _stream(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())):
        _kernel(name)((blocks,), (threads,), values, shared_mem=shared)


@cache
def _stream(pointer: int) -> cupy.cuda.Stream:
    return cupy.cuda.ExternalStream(pointer)


@cache
def _kernel(name: str) -> cupy.RawKernel:
    return _module().get_function(name)


@cache
def _module() -> cupy.RawModule:
    types = _NAMES.values()
    names = ["choose", "choose_covers", "sort_pairs", "greedy"]
    names += [f"rms_norm<{a}, {b}>" for a in types for b in types]
    for wide_float, wide_bf16 in ((4, 8), (1, 1)):
        wide = {"float": wide_float, "bf16": wide_bf16}
        names += [f"{kernel}<{t}, {wide[t]}>" for kernel in ("swiglu", "gather") for t in types]
        names += [f"combine<{t}, {t}, {wide[t]}>" for t in types]
    names += ["combine<bf16, float, 4>", "combine<bf16, float, 1>"]
    # No fast mathematics and no contraction: a product and a sum round as written, as on the CPU.
    return cupy.RawModule(code=SOURCE, options=("--std=c++17", "--fmad=false"), name_expressions=names)


def _wide(d: int, *tensors: Tensor) -> int:
    """Elements that a thread moves at once: 16 bytes of the largest type where all rows are aligned, else one."""
    n = _WIDE // max(t.dtype.itemsize for t in tensors)
    aligned = d % n == 0 and all(t.data_ptr() % (n * t.dtype.itemsize) == 0 for t in tensors)
    return n if aligned else 1


def _threads(chunks: int) -> int:
    return min(256, -(-chunks // 32) * 32)
