"""Attention over pages: queries and keys turned and stored, then an online softmax (Milakov and Gimelshein, 2018).

A position goes through the pages of its sequence in order, by itself: its arithmetic is the same in prefill, in chunks,
in decode and after a restart. Keys of a page are stored transposed, [width, PAGE]; values lie as rows, [PAGE, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import njit, types

from moempi.device.kernels.blocks import by_blocks
from moempi.device.kernels.elements import Elements, exp, get_float, put_float
from moempi.device.kernels.lanes import (
    LANES,
    VECTOR,
    add,
    divide,
    first_else,
    fused,
    larger,
    largest,
    load,
    multiply,
    multiply_add,
    read_float,
    read_int,
    splat,
    store,
    subtract,
    total,
    write_float,
)  # fmt: skip
from moempi.device.kernels.rows import scaling

PAGE = 64  # positions of a page of the cache
LOWEST = -math.inf


@njit
def rotate(head, middle, cos, sin, factor, out):
    """A head of float32 turned, its two halves against each other (Su et al., 2021), and scaled."""
    for i in range(0, middle, 16):
        left = middle - i
        a, b = get_float(head + 4 * i, left), get_float(head + 4 * (middle + i), left)
        low, high = 4 * i, 4 * (middle + i)
        v = fused(b, get_float(sin + low, left), multiply(a, get_float(cos + low, left)))
        put_float(out + low, multiply(v, splat(factor)), left)
        v = fused(a, get_float(sin + high, left), multiply(b, get_float(cos + high, left)))
        put_float(out + high, multiply(v, splat(factor)), left)


def head_norm(e: Elements) -> Callable[..., Any]:
    """A head of E normalised into float32."""
    size, get, scale_of = e.size, e.get, scaling(e)

    @njit
    def normalise(head, dim, weight, eps, out):
        scale = splat(scale_of(head, dim, eps))
        for i in range(0, dim, 16):
            v = multiply(multiply(get(head + size * i, dim - i), scale), get_float(weight + 4 * i, dim - i))
            put_float(out + 4 * i, v, dim - i)

    return normalise


def storing(e: Elements) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A key of float32 as a column of a page, by way of `scratch`; a value of E as a row."""
    size, get, put, copy = e.size, e.get, e.put, e.copy

    @njit
    def store_key(key, dim, column, scratch):
        for i in range(0, dim, 16):
            put(scratch + size * i, get_float(key + 4 * i, dim - i), dim - i)
        for i in range(dim):
            copy(column + size * i * PAGE, scratch + size * i)

    @njit
    def store_value(value, dim, to):
        for i in range(0, dim, 16):
            put(to + size * i, get(value + size * i, dim - i), dim - i)

    return store_key, store_value


def build_turn_heads(e: Elements) -> Callable[..., None]:
    """The kernel between the projection and attention."""
    size, normalise = e.size, head_norm(e)
    store_key, store_value = storing(e)

    def turn_heads(
        x, n, heads, kv, dim, weight, positions, cos, sin, pages, offsets, keys, values, width, queries, scratch,
        eps, scale,
    ):  # fmt: skip
        """Queries and keys normalised and rotated; queries scaled into float32, keys and values into the cache.

        x: [n, heads + 2 * kv, dim] of E; weight: float32 [heads + kv, dim]; cos, sin: float32 [.., dim] by position;
        pages, offsets: int64 [n]; keys: [pages, kv, width, PAGE] of E; values: [pages, kv, PAGE, width] of E;
        queries: float32 [n, heads, dim]; scratch: float32, 2 * dim.
        """
        turned = scratch + 4 * dim
        for t in range(n):
            turn = 4 * dim * read_int(positions + 8 * t)
            page, offset = read_int(pages + 8 * t), read_int(offsets + 8 * t)
            row = x + size * t * (heads + 2 * kv) * dim
            for h in range(heads):
                normalise(row + size * h * dim, dim, weight + 4 * h * dim, eps, scratch)
                rotate(scratch, dim // 2, cos + turn, sin + turn, scale, queries + 4 * (t * heads + h) * dim)
            for h in range(kv):
                key = heads + h
                normalise(row + size * key * dim, dim, weight + 4 * key * dim, eps, scratch)
                rotate(scratch, dim // 2, cos + turn, sin + turn, 1.0, turned)
                store_key(turned, dim, keys + size * ((page * kv + h) * width * PAGE + offset), scratch)
                value = row + size * (heads + kv + h) * dim
                store_value(value, dim, values + size * ((page * kv + h) * PAGE + offset) * width)

    return turn_heads


@njit
def highest_of(scores, count):
    """The largest of a page's first scores; what else sixteen of them hold becomes -inf."""
    last = (count - 1) // 16 * 16
    store(scores + 4 * last, first_else(load(scores + 4 * last), count - last, splat(LOWEST)))
    highest = load(scores)
    for j in range(16, count, 16):
        highest = larger(highest, load(scores + 4 * j))
    return largest(highest)


@njit
def weigh(scores, count, peak):
    """Scores -> exp(score - peak), in place; their sum, lane by lane."""
    sums = splat(0.0)
    for j in range(0, count, 16):
        v = exp(subtract(load(scores + 4 * j), splat(peak)))
        store(scores + 4 * j, v)
        sums = add(sums, v)
    return sums


def mixing(e: Elements) -> Callable[..., Any]:
    """Weighted values of a page."""
    size = e.size
    mix_four, mix_two, mix_one = (by_blocks(vectors, e.read, multiply_add, resumed=True) for vectors in (4, 2, 1))

    @njit
    def mix(weights, n, count, values, width, mixed):
        """`mixed` [n, width] += weights [n, PAGE] times values [count, width], key by key."""
        line, gap = size * width, size * LANES
        at = 0
        while at + 64 <= width:
            mix_four(weights, n, 4 * PAGE, count, values + size * at, line, gap, mixed + 4 * at, 4 * width)
            at += 64
        if at + 32 <= width:
            mix_two(weights, n, 4 * PAGE, count, values + size * at, line, gap, mixed + 4 * at, 4 * width)
            at += 32
        if at < width:
            mix_one(weights, n, 4 * PAGE, count, values + size * at, line, gap, mixed + 4 * at, 4 * width)

    return mix


def build_attend(e: Elements) -> Callable[..., None]:
    """The kernel of attention."""
    size, put, mix = e.size, e.put, mixing(e)
    scores_of = by_blocks(PAGE // LANES, e.read, multiply_add)

    def attend(queries, n, heads, kv, dim, positions, lines, pages, most, keys, values, width, out, scratch):
        """Causal attention of n rows, page after page, with an online softmax; heads that share keys go together.

        queries: float32 [n, heads, dim], scaled; lines: int64 [n], line of `pages` int64 [.., most] of each row;
        out: [n, heads, dim] of E; scratch: float32, heads / kv * (PAGE + width + 2 * LANES).
        """
        group = heads // kv
        mixed = scratch + group * 4 * PAGE
        sums = mixed + group * 4 * width  # [group, LANES]
        peaks = sums + group * VECTOR
        for t in range(n):
            last = read_int(positions + 8 * t)
            row_pages = pages + 8 * most * read_int(lines + 8 * t)
            for g in range(kv):
                first = t * heads + g * group
                for h in range(group):
                    write_float(peaks + 4 * h, types.float32(LOWEST))
                for i in range(0, group * width, 16):
                    store(mixed + 4 * i, splat(0.0))
                for block in range(last // PAGE + 1):
                    page = (read_int(row_pages + 8 * block) * kv + g) * PAGE * width * size
                    count = min(PAGE, last + 1 - block * PAGE)
                    scores_of(
                        queries + 4 * first * dim, group, 4 * dim, dim, keys + page, size * PAGE, size * LANES,
                        scratch, 4 * PAGE,
                    )  # fmt: skip
                    for h in range(group):
                        scores = scratch + 4 * PAGE * h
                        peak = read_float(peaks + 4 * h)
                        highest = max(peak, highest_of(scores, count))
                        write_float(peaks + 4 * h, highest)
                        if block == 0:
                            store(sums + VECTOR * h, weigh(scores, count, highest))
                            continue
                        scale = exp(splat(peak - highest))
                        store(sums + VECTOR * h, fused(load(sums + VECTOR * h), scale, weigh(scores, count, highest)))
                        for i in range(h * width, (h + 1) * width, 16):
                            store(mixed + 4 * i, multiply(load(mixed + 4 * i), scale))
                    mix(scratch, group, count, values + page, width, mixed)
                for h in range(group):
                    whole, to = splat(total(load(sums + VECTOR * h))), out + size * (first + h) * dim
                    for i in range(0, dim, 16):
                        put(to + size * i, divide(load(mixed + 4 * (h * width + i)), whole), dim - i)

    return attend
