"""The CPU's kernels on tensors: what they do to addresses, with the memory it needs.

A row is what a token is at a place in the network; tensors are contiguous. The bits of a row depend on the row alone,
and on nothing of how a call was made; threads share nothing but the outputs of large products.
"""

from __future__ import annotations

from array import array
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from itertools import chain, pairwise

import torch
from torch import Tensor

from moempi.device.kernels import PANEL, ROWS, TILE
from moempi.device.kernels.compiled import Kernels, kernels
from moempi.model.attention import AttentionPlan
from moempi.model.cache import KVCache
from moempi.model.gate import Route

LANES = 16
SHARED = 2**18  # weights of a product, up to which one thread is faster than several


def kernels_for(dtype: torch.dtype) -> Kernels:
    """The kernels for rows of float32 or bfloat16."""
    return kernels(dtype == torch.bfloat16)


_scratch = torch.empty(0, dtype=torch.float32)


def scratch(floats: int) -> int:
    """Address of memory for so many float32, valid until the next call."""
    global _scratch
    if _scratch.numel() < floats:
        _scratch = torch.empty(2 * floats)
    return _scratch.data_ptr()


def padded(n: int) -> int:
    """The next multiple of sixteen."""
    return -(-n // LANES) * LANES


def pack_panels(weight: Tensor) -> Tensor:
    """[O, I] -> [O / 16, I, 16], zero padded: sixteen outputs lie together for every input."""
    outputs, inputs = weight.shape
    wide = weight.new_zeros(padded(outputs), inputs)
    wide[:outputs] = weight
    return wide.view(-1, LANES, inputs).transpose(1, 2).contiguous()


class SmallLinear:
    """`y = x @ weight.T` in float32, rounded once, for weights that fit a core's cache.

    Args:
        weight: [O, I], float32 or bfloat16; packed, so that the caller can drop it.
    """

    def __init__(self, weight: Tensor):
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        self._panels = pack_panels(weight)
        self._weight = self._panels.data_ptr()
        self._scratch = ROWS * (self.shape[1] + padded(self.shape[0]))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[R, I] -> [R, O] in the weight's dtype; `residual` [R, O] of that dtype is added before it is rounded."""
        x = x.to(self.dtype)
        n, (outputs, inputs) = x.shape[0], self.shape
        out = torch.empty((n, outputs), dtype=self.dtype)
        kernels_for(self.dtype).product(
            x.data_ptr(),
            n,
            inputs,
            self._weight,
            outputs,
            out.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            scratch(self._scratch),
        )
        return out


class WideLinear:
    """`y = x @ weight.T` in float32, rounded once, for weights that no cache holds; as many threads as torch has share
    the outputs.

    Args:
        weight: [O, I], float32 or bfloat16, of a kind that there is a `wide_product` of; packed, so that the caller
            can drop it.
    """

    def __init__(self, weight: Tensor):
        self.shape, self.dtype = (weight.shape[0], weight.shape[1]), weight.dtype
        self._panels = pack_wide_panels(weight)
        self._weight, self._n_panels = self._panels.data_ptr(), self._panels.shape[0]
        self._threads = self._n_panels if weight.numel() > SHARED else 1  # at most

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[R, I] -> [R, O] in the weight's dtype; `residual` [R, O] is added to it."""
        x = x.to(self.dtype).contiguous()
        n, (outputs, inputs) = x.shape[0], self.shape
        out = torch.empty((n, outputs), dtype=self.dtype)
        threads = min(torch.get_num_threads(), self._threads)
        odd = inputs % 2 if self.dtype == torch.bfloat16 else 0
        room = TILE * (PANEL + odd * (inputs + 1))
        memory, kernel = scratch(threads * room), kernels_for(self.dtype).wide_product
        calls = [
            (x.data_ptr(), n, inputs, self._weight, outputs, first, last, out.data_ptr(), memory + 4 * room * thread)
            for thread, (first, last) in enumerate(shares(self._n_panels, threads))
        ]
        others: list[Future[None]] = []
        try:
            others = [_pool(threads).submit(kernel, *call) for call in calls[1:]]
            kernel(*calls[0])
        finally:
            wait(others)  # whatever happens, nobody writes on
        for other in others:
            other.result()
        return out if residual is None else residual + out


def pack_wide_panels(weight: Tensor) -> Tensor:
    """[O, I] -> [O / 64, I, 64], or [O / 64, I / 2, 64, 2] of bfloat16: pairs of inputs; zero padded."""
    (outputs, inputs), pair = weight.shape, 2 if weight.dtype == torch.bfloat16 else 1
    wide = weight.new_zeros(-(-outputs // PANEL) * PANEL, -(-inputs // pair) * pair)
    wide[:outputs, :inputs] = weight
    return wide.view(-1, PANEL, wide.shape[1] // pair, pair).transpose(1, 2).contiguous()


def shares(panels: int, threads: int) -> list[tuple[int, int]]:
    """[first, last) of the panels that each thread computes."""
    return list(pairwise(panels * thread // threads for thread in range(threads + 1)))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads with the one that calls, made when they are first wanted; kernels let go of the interpreter."""
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="moempi-products")


class SmallExpert:
    """The packed matrices of an expert, or of one of its leaves, that is small as a whole.

    Args:
        gate, up: [F, D].
        down: [D, F].
    """

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor):
        self.hidden, self.d_model = gate.shape
        self._panels = [pack_panels(part) for part in (gate, up, down)]
        self.weights = [part.data_ptr() for part in self._panels]

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, D] -> [R, D] of `dtype`: that of x, or float32."""
        out = torch.empty(x.shape, dtype=dtype)
        run_experts([[x.data_ptr(), out.data_ptr(), x.shape[0], *self.weights]], self, x.dtype, dtype)
        return out


def run_experts(batches: list[list[int]], shape: SmallExpert, dtype: torch.dtype, out: torch.dtype) -> None:
    """Several experts of one shape, each on its own rows.

    Args:
        batches: addresses of rows and answers, number of rows, addresses of the expert's three matrices.
        dtype, out: of rows and of answers.
    """
    table = array("q", chain.from_iterable(batches))  # a tenth of what a tensor of the same costs
    room = ROWS * (2 * padded(shape.d_model) + 2 * padded(shape.hidden))
    kernels_for(dtype).experts(
        table.buffer_info()[0], len(batches), shape.d_model, shape.hidden, out == torch.float32, scratch(room)
    )


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [R, D] with a float32 weight, rounded to x's dtype (Zhang and Sennrich, 2019)."""
    out = torch.empty_like(x)
    n, d = x.shape
    kernels_for(x.dtype).norm(x.data_ptr(), n, d, weight.data_ptr(), eps, out.data_ptr())
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """[R, 2F], gate first -> silu(gate) * up [R, F] in the same dtype (Shazeer, 2020)."""
    n, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((n, hidden), dtype=gate_up.dtype)
    kernels_for(gate_up.dtype).swiglu(gate_up.data_ptr(), n, hidden, out.data_ptr())
    return out


def turn_heads(
    rows: Tensor,
    norm: Tensor,
    tables: tuple[Tensor, Tensor],
    plan: AttentionPlan,
    lo: int,
    cache: KVCache,
    layer: int,
    queries: Tensor,
    eps: float,
) -> None:
    """Normalise and rotate queries and keys of the rows from `lo` on; keys and values go into the cache.

    Args:
        rows: [R, (heads + 2 kv_heads) * head_dim], the projections of one slice.
        norm: float32 [heads + kv_heads, head_dim].
        tables: cosines and signed sines float32 [positions, head_dim].
        queries: float32 [T, heads, head_dim]; rows from `lo` on are written, scaled by head_dim ** -0.5.
    """
    _, kv, width, _ = cache.keys[layer].shape
    heads, dim = queries.shape[1:]
    kernels_for(rows.dtype).turn_heads(
        rows.data_ptr(),
        rows.shape[0],
        heads,
        kv,
        dim,
        norm.data_ptr(),
        plan.positions.data_ptr() + 8 * lo,
        tables[0].data_ptr(),
        tables[1].data_ptr(),
        plan.write_pages.data_ptr() + 8 * lo,
        plan.write_offsets.data_ptr() + 8 * lo,
        cache.keys[layer].data_ptr(),
        cache.values[layer].data_ptr(),
        width,
        queries[lo:].data_ptr(),
        scratch(2 * dim + LANES),
        eps,
        dim**-0.5,
    )


def attend(queries: Tensor, cache: KVCache, layer: int, plan: AttentionPlan, lo: int, hi: int, out: Tensor) -> None:
    """Attention of rows [lo, hi) of a plan; keys and values of the batch must be in the cache already.

    Args:
        queries: float32 [T, heads, head_dim], scaled.
        out: [T, heads * head_dim] of the cache's dtype; rows lo to hi are written.
    """
    _, kv, width, page = cache.keys[layer].shape
    heads, dim = queries.shape[1:]
    kernels_for(out.dtype).attend(
        queries[lo:].data_ptr(),
        hi - lo,
        heads,
        kv,
        dim,
        plan.positions.data_ptr() + 8 * lo,
        plan.lines.data_ptr() + 8 * lo,
        plan.pages.data_ptr(),
        plan.pages.shape[1],
        cache.keys[layer].data_ptr(),
        cache.values[layer].data_ptr(),
        width,
        out[lo:].data_ptr(),
        scratch(heads // kv * (page + width + 2 * LANES)),
    )


def choose_experts(logits: Tensor, top_k: int, normalize: bool) -> Route:
    """Softmax over all experts, then the K best; equal scores go to the lowest index. logits: [T, E] float32."""
    n, count = logits.shape
    experts, weights = torch.empty((n, top_k), dtype=torch.int64), torch.empty((n, top_k))
    kernels_for(logits.dtype).choose_experts(
        logits.data_ptr(), n, count, top_k, normalize, experts.data_ptr(), weights.data_ptr(), scratch(count + LANES)
    )
    return Route(experts, weights)


def combine(x: Tensor, weights: Tensor, answers: Tensor, places: Tensor) -> Tensor:
    """Residual x [T, D] plus the weighted answers of every token's pairs, k ascending, rounded once.

    Args:
        weights: float32 [T, K].
        answers: [T * K, D] of x's dtype.
        places: int64 [T * K], the answer of every pair.
    """
    out = torch.empty_like(x)
    (n, d), k = x.shape, weights.shape[1]
    kernels_for(x.dtype).combine(
        x.data_ptr(), n, d, k, answers.data_ptr(), places.data_ptr(), weights.data_ptr(), out.data_ptr()
    )
    return out
