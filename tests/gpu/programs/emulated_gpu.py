"""A GPU that is none: what moempi asks of CUDA, CuPy and Triton, done on the CPU, for tests where there is no GPU.

    python emulated_gpu.py LIST ENGINE      as run_jobs.py

Kernels are launched as on a GPU, by name, with addresses and numbers, and compute row by row, so that a row's bits
depend on it alone: those of the current stream at once, expert calls and copies through the host later, as does come
what the host reads, counts, tokens and marks of streams. Which stream goes on when is drawn: only what waits for a mark
is in order. A recording does again what was recorded, with the addresses of then. What is emulated is the kernels'
meaning, not their code: `test_kernels` says that the two are the same, on a GPU or, of row kernels, by `host_kernels`.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import struct
import sys
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_FRAME = 512 + 64  # bytes with its answer: of steady steps some messages fit, and some do not
TYPES = {"float": torch.float32, "bf16": torch.bfloat16}


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The memory at an address as a tensor."""
    n = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not n:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer((ctypes.c_uint8 * n).from_address(int(address)), dtype=dtype).view(shape)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [R, I] @ weight [O, I].T, every row by itself."""
    return torch.stack([weight.double() @ row.double() for row in x]) if len(x) else x.new_empty(0, len(weight))


# ---------------------------------------------------------------- row kernels, by name


class Kernel:
    """Stands for `moempi.device.cuda_launch.Kernel`.

    Args:
        name: of an instance of a template.
    """

    def __init__(self, name: str):
        self._work, _, types_of = name.partition("<")
        self._types = [TYPES.get(t.strip()) for t in types_of.rstrip(">").split(",")]

    def __call__(self, blocks: int, threads: int, values: list[Any], shared: int = 0) -> None:
        KERNELS[self._work](blocks, self._types, *values)


def float_of(bits: int) -> float:
    value: float = struct.unpack("<f", int(bits).to_bytes(4, "little"))[0]
    return value


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    squares = x.double().pow(2).mean(-1, keepdim=True)
    return x.float() * torch.rsqrt(squares + eps).float() * weight


def rms_norm(blocks: int, kinds: Any, x: int, weight: int, out: int, d: int, eps: int) -> None:
    rows, scale = at(x, (blocks, d), kinds[0]), at(weight, (d,), torch.float32)
    at(out, (blocks, d), kinds[0]).copy_(normed(rows, scale, float_of(eps)))


def add_norm(blocks: int, kinds: Any, a: int, b: int, weight: int, total: int, norm: int, d: int, eps: int) -> None:
    one, other, into = (at(each, (blocks, d), kinds[0]) for each in (a, b, total))
    into.copy_(one + other)
    at(norm, (blocks, d), kinds[0]).copy_(normed(into, at(weight, (d,), torch.float32), float_of(eps)))


def turn_heads(
    blocks: int, kinds: Any, rows: int, norm: int, cos: int, sin: int, positions: int, pages: int, offsets: int,
    queries: int, keys: int, values: int, n: int, heads: int, kv: int, dim: int, width: int, page: int, lanes: int,
    eps: int, scale: int,
) -> None:  # fmt: skip
    where, of_page, offset = (at(each, (n,), torch.int64) for each in (positions, pages, offsets))
    x = at(rows, (n, heads + 2 * kv, dim), kinds[0])
    both = normed(x[:, : heads + kv], at(norm, (heads + kv, dim), torch.float32), float_of(eps))
    tables = [at(each, (int(where.max()) + 1, dim), torch.float32)[where].unsqueeze(1) for each in (cos, sin)]
    low, high = both.chunk(2, dim=-1)
    turned = both * tables[0] + torch.cat([high, low], dim=-1) * tables[1]
    at(queries, (n, heads, dim), kinds[0]).copy_(turned[:, :heads] * float_of(scale))
    most = int(of_page.max()) + 1
    at(keys, (most, kv, width, page), kinds[0])[of_page, :, :dim, offset] = turned[:, heads:].to(kinds[0])
    at(values, (most, kv, page, width), kinds[0])[of_page, :, offset, :dim] = x[:, heads + kv :]


def swiglu(blocks: int, kinds: Any, source: int, target: int, f: int) -> None:
    gate, up = at(source, (blocks, 2, f), kinds[0]).float().unbind(1)
    at(target, (blocks, f), kinds[0]).copy_(gate / (1 + torch.exp(-gate)) * up)


def gather(blocks: int, kinds: Any, source: int, tokens: int, out: int, d: int) -> None:
    taken = at(tokens, (blocks,), torch.int32).long()
    at(out, (blocks, d), kinds[0]).copy_(at(source, (int(taken.max()) + 1, d), kinds[0])[taken])


def scatter(blocks: int, kinds: Any, source: int, places: int, out: int, top_k: int, d: int) -> None:
    place = at(places, (blocks, top_k), torch.int32).long()
    there = place[:, 0] >= 0
    rows = at(source, (blocks, d), kinds[0])[there].repeat_interleave(top_k, 0)
    at(out, (int(place.max()) + 1, d), kinds[0])[place[there].flatten()] = rows


def combine(
    blocks: int, kinds: Any, x: int, answers: int, places: int, weights: int, out: int, top_k: int, d: int
) -> None:
    place, weight = at(places, (blocks, top_k), torch.int32).long(), at(weights, (blocks, top_k), torch.float32)
    there = place[:, 0] >= 0
    rows = at(answers, (int(place.max()) + 1, d), kinds[1])
    total = torch.zeros(int(there.sum()), d)
    for k in range(top_k):
        total += rows[place[there, k]].float() * weight[there, k, None]
    result = at(x, (blocks, d), kinds[0]).clone()
    result[there] = (result[there].float() + total).to(kinds[0])
    at(out, (blocks, d), kinds[0]).copy_(result)


def choose(blocks: int, kinds: Any, logits: int, experts: int, weights: int, t: int, e: int, k: int, norm: int) -> None:
    from moempi.model import gate

    route = gate.choose_experts(at(logits, (t, e), torch.float32), k, bool(norm))
    at(experts, (t, k), torch.int32).copy_(route.experts)
    at(weights, (t, k), torch.float32).copy_(route.weights)


def sort_pairs(
    blocks: int, kinds: Any, experts: int, turns: int, cover_of: int, replicas: int, tokens: int, places: int,
    counts: int, n: int, top_k: int, most: int, layer: int, headers: int, packed: int, row: int,
) -> None:  # fmt: skip
    chosen, turn = at(experts, (n,), torch.int32).long(), at(turns, (n // top_k,), torch.int64)
    turn = turn.repeat_interleave(top_k)
    n_experts = int(chosen.max()) + 1
    table, of = at(cover_of, (n_experts, most), torch.int32), at(replicas, (n_experts,), torch.int32)
    covers = torch.where(turn < 0, blocks, table[chosen, (turn + layer) % of[chosen]].long())
    order = covers.argsort(stable=True)
    real = int((covers < blocks).sum())
    of_covers, landing = covers[covers < blocks].bincount(minlength=blocks), at(counts, (blocks,), torch.int64)
    landing.fill_(-1)  # what the host finds there before the stream has come past a mark behind this
    COMING.add(lambda: landing.copy_(of_covers))
    ahead = at(headers, (blocks, 3), torch.int32).tolist() if headers else [(0, 0, 0)] * blocks
    into = at(places, (n,), torch.int32)
    into.fill_(-1)
    of, begin = of_covers.tolist(), of_covers.cumsum(0) - of_covers
    for place, pair in enumerate(order[:real].tolist()):
        into[pair] = place + ahead[covers[pair]][1]
        if tokens:
            at(tokens + 4 * int(into[pair]), (1,), torch.int32).fill_(pair // top_k)
    for cover, (first, rows, nbytes) in enumerate(ahead):
        if nbytes:
            header = packed + (int(begin[first]) + rows) * row - nbytes
            at(header + 4 * (cover - first), (1,), torch.int32).fill_(of[cover])


def row_tables(
    blocks: int, kinds: Any, batches: int, tiles: int, inward: int, outward: int, room: int, n_batches: int,
    n_slots: int, tile: int, row: int, *taken_along: int,
) -> None:  # fmt: skip
    told, at_tile, begin = list(taken_along), 0, 0
    if batches:
        told = at(batches, (3 * n_batches,), torch.int64).tolist()
    given = []
    for rows, answers, counts in (told[3 * i : 3 * i + 3] for i in range(n_batches)):
        of_slots = [counts] if n_slots == 1 else at(counts, (n_slots,), torch.int32).tolist()
        given.append([rows, answers, *of_slots])
    table = at(tiles, (room, 3), torch.int64)
    table[:, 0] = 0
    for slot in range(n_slots):
        rows = sum(batch[2 + slot] for batch in given)
        for first in range(0, rows, tile):
            table[at_tile] = torch.tensor([rows - first, begin + first, slot])
            at_tile += 1
        for batch in given:
            skipped, n = sum(batch[2 : 2 + slot]), batch[2 + slot]
            for places, origin in ((inward, batch[0]), (outward, batch[1])):
                at(places + 8 * begin, (n,), torch.int64).copy_(origin + (skipped + torch.arange(n)) * row)
            begin += n


def greedy(blocks: int, kinds: Any, logits: int, tokens: int, copy: int, logprobs: int, v: int) -> None:
    scores = at(logits, (blocks, v), torch.float32)
    best = scores.argmax(-1)  # the first of equals
    chances = scores.log_softmax(-1).gather(1, best[:, None])[:, 0]
    if copy:
        at(copy, (blocks,), torch.int64).copy_(best)
    for address, values in ((tokens, best), (logprobs, chances)):  # which the host reads
        at(address, (blocks,), values.dtype).fill_(-1)
        COMING.add(partial(at(address, (blocks,), values.dtype).copy_, values))


KERNELS: dict[str, Callable[..., None]] = {
    each.__name__: each
    for each in (
        rms_norm, add_norm, turn_heads, swiglu, gather, scatter, combine, choose, sort_pairs, row_tables, greedy
    )
}  # fmt: skip


# ---------------------------------------------------------------- products and attention


def launch_product(
    source: int, weights: Tensor, target: int, tiles: Any, way: Any, places: int | None, rows: int, out: torch.dtype
) -> None:
    """Stands for `moempi.device.cuda_products._launch`."""
    outputs, inputs = weights.shape[-2:]
    dtype, size, unit = weights.dtype, weights.itemsize, tiles.unit
    if way == 0:
        result = product(at(source, (rows, inputs), dtype), weights)
        at(target, (rows, outputs), out).copy_(result)
        return
    for left, begin, slot in at(tiles.table, (tiles.n, 3), torch.int64).tolist():
        for row in range(begin, begin + min(left, tiles.tile.rows)):
            place = int(at(places + 8 * row, (1,), torch.int64)) * unit * size  # type: ignore[operator]
            from_x = source + (place if way == 1 else row * inputs * size)
            to = target + (place if way == 2 else row * outputs * size)
            result = product(at(from_x, (1, inputs), dtype), weights[slot])
            at(to, (1, outputs), dtype).copy_(result)


def attention_of(
    dtype: torch.dtype, aligned: Any, heads: int, kv_heads: int, dim: int, width: int, group: int, tile: int
) -> Any:
    """Stands for `moempi.device.cuda_attention._compiled`."""

    def kernel(grid: Any, queries: int, keys: int, values: int, out: int, tiles: int, positions: int, pages: int,
               columns: int) -> None:  # fmt: skip
        page = keys_page()
        for i, (first, n_rows, n_pages, line) in enumerate(at(tiles, (grid[0], 4), torch.int32).tolist()):
            book = at(pages + 8 * line * columns, (n_pages,), torch.int64)
            most = int(book.max()) + 1
            k = at(keys, (most, kv_heads, width, page), dtype)[book]  # [pages, kv, width, PAGE]
            v = at(values, (most, kv_heads, page, width), dtype)[book]
            for j in range(n_rows):
                token, member = divmod(first + j, group)
                position = int(at(positions + 4 * (i * tile + j), (1,), torch.int32))
                for kv in range(kv_heads):
                    where = ((token * heads) + kv * group + member) * dim
                    q = at(queries + dtype.itemsize * where, (dim,), dtype).double()
                    known = k[:, kv, :dim].permute(0, 2, 1).reshape(-1, dim)[: position + 1].double()
                    held = v[:, kv, :, :dim].reshape(-1, dim)[: position + 1].double()
                    weights = (known @ q).softmax(0)
                    at(out + dtype.itemsize * where, (dim,), dtype).copy_(weights @ held)

    return kernel


def keys_page() -> int:
    """Positions of a page."""
    from moempi.model.config import PAGE

    return PAGE


# ---------------------------------------------------------------- streams, clocks, graphs


class Coming:
    """What the streams have yet to do: each in its order, and which of them goes on is drawn.

    Attributes:
        late: else nothing waits.
        current: the stream that is launched on.
    """

    def __init__(self) -> None:
        self.late, self.current = True, 0
        self._streams: dict[int, deque[Callable[[], Any]]] = {}
        self._random = random.Random(1)

    def add(self, work: Callable[[], Any], stream: int | None = None) -> None:
        """Behind all that a stream has been given, by default the current one."""
        if self.late:
            self._streams.setdefault(self.current if stream is None else stream, deque()).append(work)
        else:
            work()

    def has(self, stream: int) -> bool:
        """Whether a stream has anything to do yet."""
        return bool(self._streams.get(stream))

    def step(self) -> bool:
        """One thing of one stream; whether there was any."""
        busy = [works for works in self._streams.values() if works]
        if busy:
            self._random.choice(busy).popleft()()
        return bool(busy)


COMING = Coming()


class Stream:
    """Has a number, and its share of what is coming."""

    numbers = itertools.count(1)

    def __init__(self, priority: int = 0):
        self.cuda_stream = next(Stream.numbers)

    def query(self) -> bool:
        """Whether it has done all that it was given."""
        return not COMING.has(self.cuda_stream)

    def wait_stream(self, other: Stream) -> None:
        """Where nothing comes late all that `other` was given is done."""
        assert not COMING.late


def set_stream(stream: Stream) -> None:
    """Launch on a stream from now on."""
    COMING.current = stream.cuda_stream


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    """Launch on a stream for a while."""
    before, COMING.current = COMING.current, stream.cuda_stream
    try:
        yield
    finally:
        COMING.current = before


def copy_memory(to: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    """At once on the current stream, else later."""
    if stream == COMING.current:
        ctypes.memmove(to, source, nbytes)
    else:
        COMING.add(lambda: ctypes.memmove(to, source, nbytes), stream)


class Event:
    """Is past."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


class Replay:
    """A graph: does again what was recorded, into the tensors that came out then."""

    def __init__(self, work: Callable[[], Any], result: Any):
        self._work, self._result, self._recorded = work, result, True

    def replay(self) -> None:
        if self._recorded:  # which did it
            self._recorded = False
            return
        result = self._work()
        for old, new in zip(tensors_of(self._result), tensors_of(result), strict=True):
            old.copy_(new)


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a recording's result."""
    if isinstance(result, Tensor):
        return [result]
    return [value for value in vars(result).values() if isinstance(value, Tensor)] if result is not None else []


def come(*_: Any) -> None:
    """The GPU comes past all that it has been given."""
    while COMING.step():
        pass


def looking_late(look: Callable[..., bool], rng: random.Random) -> Callable[..., bool]:
    """A look at what comes, before which as often as not the GPU comes past one mark more, or something else."""

    def wrapped(at_what: Any, **options: bool) -> bool:
        if rng.random() < 0.5:
            COMING.step()
        return look(at_what, **options)

    return wrapped


def landing_late(landed: Callable[..., None]) -> Callable[..., None]:
    """Rows that are here some time after their counts, and not in the order in which they have come."""
    streams = itertools.cycle([-1, -2, -3])

    def wrapped(*given: Any) -> None:
        stream = next(streams)
        for _ in range(2):
            COMING.add(lambda: None, stream)
        COMING.add(lambda: landed(*given), stream)

    return wrapped


def launched_late(work: Callable[..., None]) -> Callable[..., None]:
    """What computes later, on the stream that it is launched on."""

    def wrapped(*given: Any) -> None:
        COMING.add(lambda: work(*given))

    return wrapped


# ---------------------------------------------------------------- putting it in place


def install(*, late: bool = True) -> None:
    """Put all of it in the place of CUDA; before anything of moempi that needs it is imported.

    Args:
        late: what the host is told comes late, as do expert calls and copies; else everything comes at once.
    """
    cupy, triton = types.ModuleType("cupy"), types.ModuleType("triton")
    cupy.cuda, triton.language = types.ModuleType("cupy.cuda"), types.ModuleType("triton.language")  # type: ignore[attr-defined]
    runtime = types.SimpleNamespace(memcpyAsync=copy_memory)
    runtime.memcpyHostToDevice = runtime.memcpyDeviceToHost = 0
    cupy.cuda.driver, cupy.cuda.runtime = types.SimpleNamespace(), runtime  # type: ignore[attr-defined]
    triton.jit = lambda *given, **_: given[0] if given else (lambda function: function)  # type: ignore[attr-defined]
    for module in (cupy, cupy.cuda, triton, triton.language):  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
    _patch_torch()
    _patch_moempi(late)


def _patch_torch() -> None:
    def unpinned(make: Any) -> Any:
        return lambda *given, pin_memory=False, **options: make(*given, **options)

    torch.zeros, torch.empty, torch.full = map(unpinned, (torch.zeros, torch.empty, torch.full))
    mm = torch.mm
    torch.mm = lambda a, b, out_dtype=None: mm(a.to(out_dtype), b.to(out_dtype)) if out_dtype else mm(a, b)
    cuda: Any = torch.cuda
    cuda.Stream, cuda.Event = Stream, Event
    cuda.stream, cuda.set_stream = on_stream, set_stream
    cuda.get_sync_debug_mode = lambda: 0
    cuda.mem_get_info = lambda *_: (0, 0)
    for name in ("set_sync_debug_mode", "_sleep"):
        setattr(cuda, name, lambda *_: None)
    cuda.synchronize, cuda.empty_cache = come, lambda: None


def _patch_moempi(late: bool) -> None:
    from moempi import prepare
    from moempi.device import cuda, cuda_attention, cuda_clock, cuda_experts, cuda_graphs, cuda_launch, cuda_products
    from moempi.device import cuda_rows as rows
    from moempi.device import cuda_transfer as transfer

    class EmulatedGpu(cuda.Cuda):
        def __init__(self, mode: str):
            self.device, self.mode, self.threads, self.model = torch.device("cpu"), mode, 1, "emulated"

        def memory_use(self) -> Any:
            return None

        def choose_products(self, shapes: Any) -> None: ...

    def record(self: Any, work: Callable[[], Any]) -> Any:
        result = work()
        return cuda_graphs._Recording(Replay(work, result), result)  # type: ignore[arg-type]

    def write(stream: int, address: int, value: int, flags: int) -> int:
        COMING.add(lambda: setattr(ctypes.c_int64.from_address(address), "value", value), stream)
        return 0

    def to_host(tensor: Tensor) -> Tensor:
        there, host = tensor.clone(), torch.full_like(tensor, -1)
        COMING.add(lambda: host.copy_(there))
        return host

    prepare._choose_gpu = lambda topology, job, shape: EmulatedGpu(shape.layout.mode)  # type: ignore[assignment]
    rows._kernel = lambda name, n_parameters, words=1: Kernel(name)  # type: ignore[assignment]
    cuda_products._launch = launch_product
    cuda_attention._compiled = attention_of  # type: ignore[assignment]
    cuda_clock._stream_write = lambda: write  # type: ignore[assignment]
    COMING.late = late
    if late:
        cuda_clock.Clock.look = looking_late(cuda_clock.Clock.look, random.Random(1))  # type: ignore[method-assign,assignment]
        for experts in (cuda_experts.Stack, cuda_experts.Pieces):
            experts.__call__ = launched_late(experts.__call__)  # type: ignore[method-assign]
    cuda_graphs.Graphs._record = record  # type: ignore[method-assign]
    transfer.to_host = to_host
    transfer.pin = lambda address, nbytes: None  # type: ignore[assignment]
    transfer.unpin = lambda address: None  # type: ignore[assignment]
    cuda_launch.current_stream = transfer.current_stream = lambda: COMING.current  # type: ignore[attr-defined]
    if late:
        from moempi.exchange.engine_cuda import CudaEngine  # which takes what has been put in place here

        CudaEngine._landed = landing_late(CudaEngine._landed)  # type: ignore[method-assign]
        CudaEngine._take_arrivals = looking_late(CudaEngine._take_arrivals, random.Random(2))  # type: ignore[method-assign,assignment]


def end_early() -> None:
    """All sequences of a home end at once, as by their tokens, when a step has begun ahead for the third time."""
    from moempi.home import Home
    from moempi.layer_cuda import CudaForward

    begin, accept, begun = CudaForward.begin, Home.accept, [0]

    def counted(forward: CudaForward, *given: Any) -> None:
        begin(forward, *given)
        begun[0] += 1

    def ended(home: Home, step: Any, *given: Any) -> None:
        if begun[0] == 3:
            for sequence in step.sequences:
                sequence.max_new_tokens = len(sequence.tokens) + 1 - sequence.n_prompt
        accept(home, step, *given)

    CudaForward.begin, Home.accept = counted, ended  # type: ignore[method-assign]


def main() -> None:
    """The jobs, and beside their list, by rank and job, how often that was done which only steady steps do."""
    import run_jobs
    from mpi4py import MPI

    import moempi.run
    from moempi import build_cuda
    from moempi.exchange.engine_cuda import CudaEngine
    from moempi.layer_cuda import StepBuffers
    from moempi.planning import gpu_memory

    gpu_memory.FRAMES_POSTED = 2  # fewer than there are ranks that send some
    build_cuda.largest_frame = lambda *_: LARGEST_FRAME  # type: ignore[attr-defined]
    if sys.argv[2] == "poisoned":  # and no more room than for one
        build_cuda.frame_bytes = lambda *_: LARGEST_FRAME  # type: ignore[attr-defined]
    if sys.argv[2] == "ending":
        sys.argv[2] = "plain"
        end_early()
    told = dict[str, Counter[str]]()  # by job
    make, came, send, run = StepBuffers.__init__, CudaEngine._came, CudaEngine.send, moempi.run.run

    def run_one(world: Any, job: Any, **given: Any) -> Any:
        made, counts = list[StepBuffers](), Counter[str]()

        def kept(one: StepBuffers, *given: Any) -> None:
            make(one, *given)
            made.append(one)

        def counted(engine: CudaEngine, *given: Any) -> None:
            counts["frames"] += 1
            came(engine, *given)

        def sent(engine: CudaEngine, message: Any, *given: Any, framed: bool = False) -> None:
            announced = engine.requests, len(engine.requests)
            send(engine, message, *given, framed=framed)
            # Counts and rows leave and an answer is awaited: three, of a frame two.
            counts["too_large"] += framed and len(announced[0]) - announced[1] == 3

        StepBuffers.__init__, CudaEngine._came, CudaEngine.send = kept, counted, sent  # type: ignore[method-assign,assignment]
        outcome = run(world, job, **given)
        for name in ("steps_ahead", "steps_begun", "steps_in_vain"):
            counts[name] = sum(getattr(one, name) for one in made)
        told[job.output.file.stem] = counts
        return outcome

    moempi.run.run = run_one  # type: ignore[assignment]
    run_jobs.main()
    Path(sys.argv[1]).with_suffix(f".steady-{MPI.COMM_WORLD.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    install()
    from moempi import mpi

    sys.exit(mpi.guard(main))
