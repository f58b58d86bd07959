"""Norm, activation, choice of experts, combine: what happens to a row between products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import njit, types

from moempi.device.kernels.elements import Elements, exp, get_float, silu
from moempi.device.kernels.lanes import (
    add,
    first_else,
    fused,
    larger,
    largest,
    multiply,
    read_float,
    read_int,
    splat,
    store,
    subtract,
    total,
    write_float,
    write_int,
)  # fmt: skip

LOWEST = -math.inf


def scaling(e: Elements) -> Callable[..., Any]:
    """1 / root mean square of a row of E (Zhang and Sennrich, 2019)."""
    size, get = e.size, e.get

    @njit
    def scale_of(x, d, eps):
        squares = splat(0.0)
        for i in range(0, d, 16):
            v = get(x + size * i, d - i)
            squares = fused(v, v, squares)
        return types.float32(1.0) / math.sqrt(total(squares) / types.float32(d) + eps)

    return scale_of


def build_norm(e: Elements) -> Callable[..., None]:
    """The kernel of the RMS norm."""
    size, get, put, scale_of = e.size, e.get, e.put, scaling(e)

    def norm(x, n, d, weight, eps, out):
        """RMS norm: rows [n, d] of E, weight float32 [d] -> rows of E."""
        for t in range(n):
            row = x + size * t * d
            scale = splat(scale_of(row, d, eps))
            for i in range(0, d, 16):
                v = multiply(multiply(get(row + size * i, d - i), scale), get_float(weight + 4 * i, d - i))
                put(out + size * (t * d + i), v, d - i)

    return norm


def build_swiglu(e: Elements) -> Callable[..., None]:
    """The kernel of the activation, where products are a library's."""
    size, get, put = e.size, e.get, e.put

    def swiglu(gate_up, n, hidden, out):
        """Rows [n, 2 * hidden] of E, gate first -> silu(gate) * up [n, hidden] of E."""
        for t in range(n):
            row = gate_up + size * 2 * t * hidden
            for i in range(0, hidden, 16):
                left = hidden - i
                v = multiply(silu(get(row + size * i, left)), get(row + size * (hidden + i), left))
                put(out + size * (t * hidden + i), v, left)

    return swiglu


@njit
def softmax(row, count, out):
    """exp(x - largest) of float32 [count], padded with zeros to sixteens; their sum."""
    peak = splat(LOWEST)
    for i in range(0, count, 16):
        peak = larger(first_else(get_float(row + 4 * i, count - i), count - i, splat(LOWEST)), peak)
    highest = splat(largest(peak))
    sums = splat(0.0)
    for i in range(0, count, 16):
        v = first_else(exp(subtract(get_float(row + 4 * i, count - i), highest)), count - i, splat(0.0))
        store(out + 4 * i, v)
        sums = add(sums, v)
    return total(sums)


@njit
def take_best(scores, count):
    """Place of the largest of float32 [count], the first of equals, and its value; it is not taken again."""
    best = types.float32(-1.0)
    found = 0
    for e in range(count):
        one = read_float(scores + 4 * e)
        if one > best:
            best = one
            found = e
    write_float(scores + 4 * found, types.float32(-2.0))
    return found, best


def build_choose_experts(e: Elements) -> Callable[..., None]:
    """The kernel of the gate's choice; logits are float32, whatever E is."""

    def choose_experts(logits, n, count, k, normalize, experts, weights, scratch):
        """Softmax over float32 logits [n, count], then the k best, of equals the first: int64, float32 [n, k].

        scratch: float32, count + 16.
        """
        for t in range(n):
            whole = softmax(logits + 4 * t * count, count, scratch)
            chosen = types.float32(0.0)
            for place in range(k):
                found, best = take_best(scratch, count)
                score = best / whole
                chosen = chosen + score
                write_int(experts + 8 * (t * k + place), found)
                write_float(weights + 4 * (t * k + place), score)
            if normalize != 0:
                for place in range(k):
                    at = weights + 4 * (t * k + place)
                    write_float(at, read_float(at) / chosen)

    return choose_experts


def build_combine(e: Elements) -> Callable[..., None]:
    """The kernel of combine."""
    size, get, put = e.size, e.get, e.put

    def combine(x, n, d, k, answers, places, weights, out):
        """Residual rows plus the weighted answers [n * k, d] of their pairs, k ascending, rounded once; all of E."""
        for t in range(n):
            for i in range(0, d, 16):
                left = d - i
                sums = splat(0.0)
                for j in range(k):
                    pair = t * k + j
                    v = get(answers + size * (read_int(places + 8 * pair) * d + i), left)
                    sums = fused(v, splat(read_float(weights + 4 * pair)), sums)
                put(out + size * (t * d + i), add(get(x + size * (t * d + i), left), sums), left)

    return combine
