"""Attention over pages: queries and keys turned and stored, then an online softmax (Milakov and Gimelshein, 2018).

A position goes through the pages of its sequence in order, by itself: its arithmetic is the same in prefill, in chunks,
in decode and after a restart. Keys of a page are stored transposed, [width, PAGE]; values lie as rows, [PAGE, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from numba import njit, types

from moempi.device.kernels.elements import Elements, exp, get_float, put_float
from moempi.device.kernels.lanes import (
    add,
    divide,
    first_else,
    fused,
    larger,
    largest,
    load,
    multiply,
    read_float,
    read_int,
    splat,
    store,
    subtract,
    total,
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


def scoring(e: Elements) -> Callable[..., Any]:
    """Scores of a page."""
    size, get_all = e.size, e.get_all

    @njit
    def scores_of(query, dim, keys, count, weights):
        """Products of a query with the keys of a page into `weights`, -inf from `count` on; their largest."""
        a = splat(0.0)
        b = splat(0.0)
        c = splat(0.0)
        d = splat(0.0)
        for i in range(dim):
            q = splat(read_float(query + 4 * i))
            at = keys + size * i * PAGE
            a = fused(q, get_all(at), a)
            b = fused(q, get_all(at + 16 * size), b)
            c = fused(q, get_all(at + 32 * size), c)
            d = fused(q, get_all(at + 48 * size), d)
        if count < PAGE:
            lowest = splat(LOWEST)
            a = first_else(a, count, lowest)
            b = first_else(b, count - 16, lowest)
            c = first_else(c, count - 32, lowest)
            d = first_else(d, count - 48, lowest)
        store(weights, a)
        store(weights + 64, b)
        store(weights + 128, c)
        store(weights + 192, d)
        return largest(larger(larger(a, b), larger(c, d)))

    return scores_of


@njit
def weigh(weights, peak):
    """Scores -> exp(score - peak), in place; their sum, lane by lane."""
    sums = splat(0.0)
    for j in range(4):
        v = exp(subtract(load(weights + 64 * j), splat(peak)))
        store(weights + 64 * j, v)
        sums = add(sums, v)
    return sums


def mixing(e: Elements) -> Callable[..., Any]:
    """Weighted values of a page."""
    size, get_all = e.size, e.get_all

    @njit
    def mix_four(weights, count, values, width, at, scale, mixed):
        """`mixed` [64 lanes from `at`] = mixed * scale + sum of weight * value, key by key."""
        a = multiply(load(mixed + 4 * at), scale)
        b = multiply(load(mixed + 4 * at + 64), scale)
        c = multiply(load(mixed + 4 * at + 128), scale)
        d = multiply(load(mixed + 4 * at + 192), scale)
        for j in range(count):
            w = splat(read_float(weights + 4 * j))
            v = values + size * (j * width + at)
            a = fused(w, get_all(v), a)
            b = fused(w, get_all(v + 16 * size), b)
            c = fused(w, get_all(v + 32 * size), c)
            d = fused(w, get_all(v + 48 * size), d)
        store(mixed + 4 * at, a)
        store(mixed + 4 * at + 64, b)
        store(mixed + 4 * at + 128, c)
        store(mixed + 4 * at + 192, d)

    @njit
    def mix_two(weights, count, values, width, at, scale, mixed):
        """The same for 32 lanes, of what four times sixteen leave over."""
        a = multiply(load(mixed + 4 * at), scale)
        b = multiply(load(mixed + 4 * at + 64), scale)
        for j in range(count):
            w = splat(read_float(weights + 4 * j))
            v = values + size * (j * width + at)
            a = fused(w, get_all(v), a)
            b = fused(w, get_all(v + 16 * size), b)
        store(mixed + 4 * at, a)
        store(mixed + 4 * at + 64, b)

    @njit
    def mix_one(weights, count, values, width, at, scale, mixed):
        """The same for 16 lanes, where the width is an odd number of sixteens."""
        a = multiply(load(mixed + 4 * at), scale)
        for j in range(count):
            a = fused(splat(read_float(weights + 4 * j)), get_all(values + size * (j * width + at)), a)
        store(mixed + 4 * at, a)

    @njit
    def mix(weights, count, values, width, scale, mixed):
        at = 0
        while at + 64 <= width:
            mix_four(weights, count, values, width, at, scale, mixed)
            at += 64
        if at + 32 <= width:
            mix_two(weights, count, values, width, at, scale, mixed)
            at += 32
        if at < width:
            mix_one(weights, count, values, width, at, scale, mixed)

    return mix


def build_attend(e: Elements) -> Callable[..., None]:
    """The kernel of attention."""
    size, put, scores_of, mix = e.size, e.put, scoring(e), mixing(e)

    def attend(queries, n, heads, kv, dim, positions, lines, pages, most, keys, values, width, out, scratch):
        """Causal attention of n rows, page after page, with an online softmax.

        queries: float32 [n, heads, dim], scaled; lines: int64 [n], line of `pages` int64 [.., most] of each row;
        out: [n, heads, dim] of E; scratch: float32, PAGE + width + 16.
        """
        group = heads // kv
        mixed = scratch + 4 * PAGE
        for t in range(n):
            last = read_int(positions + 8 * t)
            row_pages = pages + 8 * most * read_int(lines + 8 * t)
            for h in range(heads):
                query = queries + 4 * (t * heads + h) * dim
                for i in range(0, width, 16):
                    store(mixed + 4 * i, splat(0.0))
                peak = types.float32(LOWEST)
                sums = splat(0.0)
                for block in range(last // PAGE + 1):
                    page = (read_int(row_pages + 8 * block) * kv + h // group) * PAGE * width * size
                    count = min(PAGE, last + 1 - block * PAGE)
                    highest = max(peak, scores_of(query, dim, keys + page, count, scratch))
                    scale = exp(splat(peak - highest))
                    peak = highest
                    sums = fused(sums, scale, weigh(scratch, peak))
                    mix(scratch, count, values + page, width, scale, mixed)
                whole = splat(total(sums))
                for i in range(0, dim, 16):
                    put(out + size * ((t * heads + h) * dim + i), divide(load(mixed + 4 * i), whole), dim - i)

    return attend
