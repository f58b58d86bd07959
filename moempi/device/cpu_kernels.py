"""The CPU's own kernels: operations on rows whose bits depend on the row alone, because of how they are written.

Each takes its rows one by one, or in blocks whose arithmetic is that of a single row; sums go in one order; nothing
is left to a library that chooses by shape. Compiled by numba through `compiled`, which calls `build` once for each
dtype. Addresses and sizes are int64; E is the model's dtype, rows lie without gaps. Lane by lane: `lanes`.

A weight [O, I] is packed as panels [O / 16, I, 16], zero padded.
"""

from __future__ import annotations

import math
from typing import Any

from numba import njit, types

from moempi.device.lanes import (
    add, copy_float, copy_half, divide, first_else, fused, largest, larger, load, load_first, load_half,
    load_half_first, multiply, power_of_two, read_float, read_int, smaller, splat, store, store_first, store_half,
    store_half_first, subtract, to_whole, total, write_float, write_int,
    zero_below,
)  # fmt: skip

PAGE = 64  # positions of a page of the cache
ROWS = 4  # of a block
LOWEST = -math.inf

_i, _f = types.int64, types.float32
SIGNATURES = {
    "norm": (_i, _i, _i, _i, _f, _i),
    "product": (_i,) * 9,
    "experts": (_i,) * 6,
    "swiglu": (_i,) * 4,
    "turn_heads": (*(_i,) * 16, _f, _f),
    "attend": (_i,) * 14,
    "choose_experts": (_i,) * 8,
    "pack": (_i,) * 18,
    "combine": (_i,) * 8,
}


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


@njit
def four_rows(x, inputs, stride, weight, panels, out, out_stride):
    """Four rows of float32 times a packed float32 weight -> float32 rows."""
    for p in range(panels):
        w = weight + p * inputs * 64
        a = splat(0.0)
        b = splat(0.0)
        c = splat(0.0)
        d = splat(0.0)
        for i in range(inputs):
            v = load(w + 64 * i)
            at = x + 4 * i
            a = fused(v, splat(read_float(at)), a)
            b = fused(v, splat(read_float(at + 4 * stride)), b)
            c = fused(v, splat(read_float(at + 8 * stride)), c)
            d = fused(v, splat(read_float(at + 12 * stride)), d)
        to = out + 64 * p
        store(to, a)
        store(to + 4 * out_stride, b)
        store(to + 8 * out_stride, c)
        store(to + 12 * out_stride, d)


@njit
def one_row(x, inputs, weight, panels, out):
    """The same for one row: four panels at a time, so that additions need not wait for each other."""
    size = inputs * 64
    whole = panels // 4 * 4
    for p in range(0, whole, 4):
        w = weight + p * size
        a = splat(0.0)
        b = splat(0.0)
        c = splat(0.0)
        d = splat(0.0)
        for i in range(inputs):
            v = splat(read_float(x + 4 * i))
            at = w + 64 * i
            a = fused(load(at), v, a)
            b = fused(load(at + size), v, b)
            c = fused(load(at + 2 * size), v, c)
            d = fused(load(at + 3 * size), v, d)
        store(out + 64 * p, a)
        store(out + 64 * (p + 1), b)
        store(out + 64 * (p + 2), c)
        store(out + 64 * (p + 3), d)
    for p in range(whole, panels):
        a = splat(0.0)
        for i in range(inputs):
            a = fused(load(weight + p * size + 64 * i), splat(read_float(x + 4 * i)), a)
        store(out + 64 * p, a)


@njit
def rows_times(x, n, inputs, stride, weight, panels, out, out_stride):
    """Up to four rows of float32 times a packed weight."""
    if n == ROWS:
        four_rows(x, inputs, stride, weight, panels, out, out_stride)
    else:
        for r in range(n):
            one_row(x + 4 * r * stride, inputs, weight, panels, out + 4 * r * out_stride)


def build(half: bool) -> dict[str, Any]:
    """The kernels for rows of float32, or of bfloat16."""
    size = 2 if half else 4
    get_all, get_first = (load_half, load_half_first) if half else (load, load_first)
    put_all, put_first = (store_half, store_half_first) if half else (store, store_first)
    copy = copy_half if half else copy_float

    @njit
    def get(at, n):
        return get_all(at) if n >= 16 else get_first(at, n)

    @njit
    def put(at, value, n):
        if n >= 16:
            put_all(at, value)
        else:
            put_first(at, value, n)

    @njit
    def get_float(at, n):
        return load(at) if n >= 16 else load_first(at, n)

    @njit
    def put_float(at, value, n):
        if n >= 16:
            store(at, value)
        else:
            store_first(at, value, n)

    @njit
    def scale_of(x, d, eps):
        """1 / root mean square of a row of E."""
        squares = splat(0.0)
        for i in range(0, d, 16):
            v = get(x + size * i, d - i)
            squares = fused(v, v, squares)
        return types.float32(1.0) / math.sqrt(total(squares) / types.float32(d) + eps)

    def norm(x, n, d, weight, eps, out):
        """RMS norm: rows [n, d] of E, weight float32 [d] -> rows of E."""
        for t in range(n):
            row = x + size * t * d
            scale = splat(scale_of(row, d, eps))
            for i in range(0, d, 16):
                v = multiply(multiply(get(row + size * i, d - i), scale), get_float(weight + 4 * i, d - i))
                put(out + size * (t * d + i), v, d - i)

    @njit
    def to_float(x, count, out):
        """E -> float32."""
        for i in range(0, count, 16):
            put_float(out + 4 * i, get(x + size * i, count - i), count - i)

    def product(x, n, inputs, weight, outputs, out, out_is_float, residual, scratch):
        """Rows [n, inputs] of E times a packed float32 weight -> E, or float32; `residual` of E is added if not 0.

        scratch: float32, 4 * (inputs + outputs padded to 16).
        """
        panels = (outputs + 15) // 16
        wide = 16 * panels
        sums = scratch + 4 * ROWS * inputs
        for t in range(0, n, ROWS):
            rows = min(ROWS, n - t)
            to_float(x + size * t * inputs, rows * inputs, scratch)
            rows_times(scratch, rows, inputs, inputs, weight, panels, sums, wide)
            for r in range(rows):
                for o in range(0, outputs, 16):
                    v = load(sums + 4 * (r * wide + o))
                    at = (t + r) * outputs + o
                    if residual != 0:
                        v = add(v, get(residual + size * at, outputs - o))
                    if out_is_float != 0:
                        put_float(out + 4 * at, v, outputs - o)
                    else:
                        put(out + size * at, v, outputs - o)

    def experts(table, n, d, hidden, out_is_float, scratch):
        """SwiGLU experts on n batches of rows. A line of `table`: rows, answers, row count, gate, up and down weights.

        scratch: float32, 4 * (2 * d + 2 * hidden, each padded to 16).
        """
        panels = (hidden + 15) // 16
        wide = 16 * panels
        out_panels = (d + 15) // 16
        gates = scratch + 4 * ROWS * d
        ups = gates + 4 * ROWS * wide
        sums = ups + 4 * ROWS * wide
        for line in range(n):
            at = table + 48 * line
            x, out, count = read_int(at), read_int(at + 8), read_int(at + 16)
            gate, up, down = read_int(at + 24), read_int(at + 32), read_int(at + 40)
            for t in range(0, count, ROWS):
                rows = min(ROWS, count - t)
                to_float(x + size * t * d, rows * d, scratch)
                rows_times(scratch, rows, d, d, gate, panels, gates, wide)
                rows_times(scratch, rows, d, d, up, panels, ups, wide)
                for i in range(0, rows * wide, 16):
                    store(gates + 4 * i, multiply(silu(load(gates + 4 * i)), load(ups + 4 * i)))
                rows_times(gates, rows, hidden, wide, down, out_panels, sums, 16 * out_panels)
                for r in range(rows):
                    for o in range(0, d, 16):
                        v = load(sums + 4 * (r * 16 * out_panels + o))
                        if out_is_float != 0:
                            put_float(out + 4 * ((t + r) * d + o), v, d - o)
                        else:
                            put(out + size * ((t + r) * d + o), v, d - o)

    def swiglu(gate_up, n, hidden, out):
        """Rows [n, 2 * hidden] of E, gate first -> silu(gate) * up [n, hidden] of E."""
        for t in range(n):
            row = gate_up + size * 2 * t * hidden
            for i in range(0, hidden, 16):
                left = hidden - i
                v = multiply(silu(get(row + size * i, left)), get(row + size * (hidden + i), left))
                put(out + size * (t * hidden + i), v, left)

    def turn_heads(
        x, n, heads, kv, dim, weight, positions, cos, sin, pages, offsets, keys, values, width, queries, scratch,
        eps, scale,
    ):  # fmt: skip
        """Queries and keys normalised and rotated; queries scaled into float32, keys and values into the cache.

        x: [n, heads + 2 * kv, dim] of E; weight: float32 [heads + kv, dim]; cos, sin: float32 [.., dim] by position;
        pages, offsets: int64 [n]; keys: [pages, kv, width, PAGE] of E; values: [pages, kv, PAGE, width] of E;
        queries: float32 [n, heads, dim]; scratch: float32, 3 * dim + 16.
        """
        middle = dim // 2
        turned = scratch + 4 * (dim + 16)
        for t in range(n):
            place = read_int(positions + 8 * t) * dim
            page, offset = read_int(pages + 8 * t), read_int(offsets + 8 * t)
            row = x + size * t * (heads + 2 * kv) * dim
            for h in range(heads + kv):
                head = row + size * h * dim
                s = splat(scale_of(head, dim, eps))
                for i in range(0, dim, 16):
                    v = multiply(multiply(get(head + size * i, dim - i), s), get_float(weight + 4 * (h * dim + i), dim - i))
                    put_float(scratch + 4 * i, v, dim - i)
                if h < heads:
                    to = queries + 4 * (t * heads + h) * dim
                    factor = splat(scale)
                else:
                    to = turned
                    factor = splat(1.0)
                for i in range(0, middle, 16):
                    left = middle - i
                    a, b = get_float(scratch + 4 * i, left), get_float(scratch + 4 * (middle + i), left)
                    low, high = 4 * (place + i), 4 * (place + middle + i)
                    v = fused(b, get_float(sin + low, left), multiply(a, get_float(cos + low, left)))
                    put_float(to + 4 * i, multiply(v, factor), left)
                    v = fused(a, get_float(sin + high, left), multiply(b, get_float(cos + high, left)))
                    put_float(to + 4 * (middle + i), multiply(v, factor), left)
                if h >= heads:
                    # Rounded to E into the scratch, then scattered: keys are stored transposed.
                    column = keys + size * (((page * kv + h - heads) * width) * PAGE + offset)
                    for i in range(0, dim, 16):
                        put(scratch + size * i, get_float(turned + 4 * i, dim - i), dim - i)
                    for i in range(dim):
                        copy(column + size * i * PAGE, scratch + size * i)
            for h in range(kv):
                source = row + size * (heads + kv + h) * dim
                to = values + size * (((page * kv + h) * PAGE + offset) * width)
                for i in range(0, dim, 16):
                    put(to + size * i, get(source + size * i, dim - i), dim - i)

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

    @njit
    def weigh(weights, peak):
        """Scores -> exp(score - peak), in place; their sum, lane by lane."""
        sums = splat(0.0)
        for j in range(4):
            v = exp(subtract(load(weights + 64 * j), splat(peak)))
            store(weights + 64 * j, v)
            sums = add(sums, v)
        return sums

    @njit
    def mix(weights, count, values, width, at, scale, mixed):
        """`mixed` [16 or 32 lanes from `at`] = mixed * scale + sum of weight * value, key by key."""
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
    def mix_last(weights, count, values, width, at, scale, mixed):
        """The same for 16 lanes, where the width is an odd number of sixteens."""
        a = multiply(load(mixed + 4 * at), scale)
        for j in range(count):
            a = fused(splat(read_float(weights + 4 * j)), get_all(values + size * (j * width + at)), a)
        store(mixed + 4 * at, a)

    def attend(queries, n, heads, kv, dim, positions, lines, pages, most, keys, values, width, out, scratch):
        """Causal attention of n rows, page after page, with an online softmax (Milakov and Gimelshein, 2018).

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
                    at = 0
                    while at + 32 <= width:
                        mix(scratch, count, values + page, width, at, scale, mixed)
                        at += 32
                    if at < width:
                        mix_last(scratch, count, values + page, width, at, scale, mixed)
                whole = splat(total(sums))
                for i in range(0, dim, 16):
                    put(out + size * ((t * heads + h) * dim + i), divide(load(mixed + 4 * i), whole), dim - i)

    def choose_experts(logits, n, count, k, normalize, experts, weights, scratch):
        """Softmax over float32 logits [n, count], then the k best, of equals the first: int64, float32 [n, k].

        scratch: float32, count + 16.
        """
        for t in range(n):
            row = logits + 4 * t * count
            peak = splat(LOWEST)
            for i in range(0, count, 16):
                peak = larger(first_else(get_float(row + 4 * i, count - i), count - i, splat(LOWEST)), peak)
            highest = splat(largest(peak))
            sums = splat(0.0)
            for i in range(0, count, 16):
                v = first_else(exp(subtract(get_float(row + 4 * i, count - i), highest)), count - i, splat(0.0))
                store(scratch + 4 * i, v)
                sums = add(sums, v)
            whole = types.float32(total(sums))
            chosen = types.float32(0.0)
            for place in range(k):
                best = types.float32(-1.0)
                found = 0
                for e in range(count):
                    one = read_float(scratch + 4 * e)
                    if one > best:
                        best = one
                        found = e
                write_int(experts + 8 * (t * k + place), found)
                write_float(scratch + 4 * found, types.float32(-2.0))
                score = best / whole
                chosen = chosen + score
                write_float(weights + 4 * (t * k + place), score)
            if normalize != 0:
                for place in range(k):
                    at = weights + 4 * (t * k + place)
                    write_float(at, read_float(at) / chosen)

    def pack(
        experts, n, k, owners, positions, layer, cover_of, replicas, n_replicas, slots, counts, begin, pairs, places,
        hidden, d, rows, load_counts,
    ):  # fmt: skip
        """Sort pairs by slot, where every cover is one slot, and copy their rows.

        experts: int64 [n, k]; cover_of: int64 [.., replicas]; counts, begin: int64 [slots], written; pairs: int64
        [n * k], the pair of every row; places: int64 [n * k], the row of every pair; rows: [n * k, d] of E;
        load_counts: int64 [experts], pairs of every expert are added.
        """
        for s in range(slots):
            write_int(counts + 8 * s, 0)
        for pair in range(n * k):
            t = pair // k
            e = read_int(experts + 8 * pair)
            turn = read_int(owners + 8 * t) + read_int(positions + 8 * t) + layer
            slot = read_int(cover_of + 8 * (e * replicas + turn % read_int(n_replicas + 8 * e)))
            write_int(places + 8 * pair, slot)
            write_int(counts + 8 * slot, read_int(counts + 8 * slot) + 1)
            write_int(load_counts + 8 * e, read_int(load_counts + 8 * e) + 1)
        at = 0
        for s in range(slots):
            write_int(begin + 8 * s, at)
            at += read_int(counts + 8 * s)
        for pair in range(n * k):
            slot = read_int(places + 8 * pair)
            place = read_int(begin + 8 * slot)
            write_int(begin + 8 * slot, place + 1)
            write_int(pairs + 8 * place, pair)
            write_int(places + 8 * pair, place)
            source = hidden + size * (pair // k) * d
            for i in range(0, d, 16):
                put(rows + size * (place * d + i), get(source + size * i, d - i), d - i)

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

    kernels = (norm, product, experts, swiglu, turn_heads, attend, choose_experts, pack, combine)
    return {kernel.__name__: kernel for kernel in kernels}
