"""Reading and writing rows of E, which is float32 or bfloat16, sixteen values at a time; and the exponential."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from numba import njit

from moempi.device.kernels.blocks import Read
from moempi.device.kernels.lanes import (
    add,
    copy_float,
    copy_half,
    divide,
    fused,
    larger,
    load,
    load_first,
    load_half,
    load_half_first,
    multiply,
    power_of_two,
    read_halves,
    read_lanes,
    smaller,
    splat,
    store,
    store_first,
    store_half,
    store_half_first,
    subtract,
    to_whole,
    zero_below,
)  # fmt: skip


@dataclass(frozen=True)
class Elements:
    """How a kernel reads and writes E; `get` and `put` take the number of values that are left of a row."""

    size: int  # bytes
    read: Read  # for `blocks`
    get: Callable[..., Any]
    put: Callable[..., Any]
    copy: Callable[..., Any]  # of a single value


def elements(half: bool) -> Elements:
    """Of bfloat16, or of float32."""
    get_all, get_first = (load_half, load_half_first) if half else (load, load_first)
    put_all, put_first = (store_half, store_half_first) if half else (store, store_first)

    @njit
    def get(at, n):
        return get_all(at) if n >= 16 else get_first(at, n)

    @njit
    def put(at, value, n):
        if n >= 16:
            put_all(at, value)
        else:
            put_first(at, value, n)

    size, read, copy = (2, read_halves, copy_half) if half else (4, read_lanes, copy_float)
    return Elements(size, read, get, put, copy)


@njit
def get_float(at, n):
    """float32, whatever E is."""
    return load(at) if n >= 16 else load_first(at, n)


@njit
def put_float(at, value, n):
    """float32, whatever E is."""
    if n >= 16:
        store(at, value)
    else:
        store_first(at, value, n)


@njit
def exp(x):
    """e to the power of x, to 2 units in the last place; 0 below -87, as at 88 above 88."""
    # In this order what is not a number stays so.
    near = smaller(splat(88.0), larger(splat(-88.0), x))
    n = to_whole(multiply(near, splat(1.44269504)))
    r = fused(n, splat(-0.693359375), near)
    r = fused(n, splat(2.12194440e-4), r)
    p = fused(r, splat(1.9875691500e-4), splat(1.3981999507e-3))
    p = fused(p, r, splat(8.3334519073e-3))
    p = fused(p, r, splat(4.1665795894e-2))
    p = fused(p, r, splat(1.6666665459e-1))
    p = fused(p, r, splat(5.0000001201e-1))
    p = add(fused(p, multiply(r, r), r), splat(1.0))
    return zero_below(multiply(p, power_of_two(n)), x, -87.0)


@njit
def silu(gate):
    """gate * sigmoid(gate)."""
    return divide(gate, add(splat(1.0), exp(subtract(splat(0.0), gate))))
