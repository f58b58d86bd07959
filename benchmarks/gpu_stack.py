"""A stack of MoE layers on GPUs, one expert per GPU, every token to all of them: how much of the experts' rate is left.

    python -m moempi.launch -n 2 -- python benchmarks/gpu_stack.py --out benchmarks/results/gpu_stack.json

Microbatches go through the layers with the engine, messages and kernels that `moempi run` uses; the routes are those
of a random gate, made before the clock starts. Beside it, in the same process and on the same rows:

- pure: the experts alone, on as many rows as they get.
- ceiling: pack, experts and combine on the same streams and with as many microbatches, nothing sent.
- copies: of a staged run, what goes between GPU and host, both ways at once and nothing else.
- lockstep: pack, `all_to_all_single` of NCCL, experts, `all_to_all_single`, combine, one layer after the other.

Times are ms per layer and microbatch, the slowest rank's, medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moempi import mpi
from moempi.exchange import gpu_mpi

gpu_mpi.prepare(os.environ)

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from moempi.device import cuda_rows
from moempi.device.cuda_experts import Batch, Scratch, Stack
from moempi.device.cuda_memory import MessageMemory, Rows, block_bytes
from moempi.device.cuda_transfer import Copies
from moempi.exchange.arrivals_cuda import CudaExperts
from moempi.exchange.dispatch_cuda import combine, dispatch, on_gpu
from moempi.exchange.engine import Channels, Limits
from moempi.exchange.engine_cuda import CudaEngine
from moempi.exchange.host_memory import HostMemory
from moempi.exchange.plan import Tags
from moempi.exchange.slots import layer_tables
from moempi.job import PlacementOptions
from moempi.model.config import ModelConfig
from moempi.model.gate import Route
from moempi.planning.placement import place
from moempi.recorder import Recorder

LAYERS, D, HIDDEN = 6, 7168, 2048
DTYPE = torch.bfloat16
ROUNDS, STEPS = 7, 2  # timed rounds; passes of every microbatch through the stack in each


@dataclass
class Bench:
    """What a rank measures with."""

    world: MPI.Intracomm
    exact: bool
    staged: bool
    tokens: int
    microbatches: int

    def __post_init__(self) -> None:
        n = self.world.size
        config = ModelConfig(LAYERS, D, 1, 1, 128, 100, 1, HIDDEN, n, n, (), True, 1e4, 1e-6, False, 64, ())
        self.device = torch.device("cuda", torch.cuda.current_device())
        random = torch.Generator(self.device).manual_seed(self.world.rank)
        tables = layer_tables(place(config, n, PlacementOptions(), 1))
        self.tables = on_gpu(tables, self.device)
        scratch = Scratch()
        self.layers = {layer: self._stack(random, scratch) for layer in tables}
        self.x = [self._draw(random, self.tokens, D) for _ in range(self.microbatches)]
        gate = self._draw(random, n, D)
        self.routes = [Route(*cuda_rows.choose_experts((x @ gate.T).float(), n, True)) for x in self.x]
        self.turns = torch.zeros(self.tokens, dtype=torch.int64, device=self.device)
        rows = self.tokens * D * DTYPE.itemsize
        home = self.microbatches * block_bytes([n * rows, n * rows])
        arrivals = self.microbatches * (n - 1) * block_bytes([rows, rows]) or 1
        self.memory = MessageMemory(self.device, home, arrivals)
        flat = self.memory.memory.view(DTYPE)
        self.host = HostMemory(self.world, self.memory.memory.nbytes) if self.staged else None
        self.engine = CudaEngine(
            Channels(self.world.Dup(), self.world.Dup(), self.world.Dup()),
            tables,
            CudaExperts(self.layers, flat),
            DTYPE,
            D,
            Tags(self.microbatches, 1),
            Limits(arrivals, 60.0, 1.0),
            Recorder("off", self.world.rank, n, LAYERS, n, n),
            payload=self.world.Dup(),
            memory=self.memory,
            host=self.host,
        )
        # For what sends nothing: rows that came, their answers and what a combine reads, all of one microbatch.
        self.rows = self._draw(random, n * self.tokens, D)
        self.answers = torch.empty_like(self.rows)
        one, counts = self.tables[0], torch.empty(n, dtype=torch.int64, device=self.device)
        replicas = one.cover_of, one.n_replicas
        self.pairs, self.places = cuda_rows.sort_pairs(self.routes[0].experts, self.turns, *replicas, 0, counts)

    def _draw(self, random: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=self.device).to(DTYPE) / 8

    def _stack(self, random: torch.Generator, scratch: Scratch) -> Stack:
        gate_up, down = self._draw(random, 1, 2 * HIDDEN, D), self._draw(random, 1, D, HIDDEN)
        return Stack(gate_up / 8, down / 8, exact=self.exact, scratch=scratch)

    # ------------------------------------------------------------ what is timed; each does STEPS passes of all

    def stack(self) -> None:
        """As a run does it."""

        async def task(m: int) -> None:
            x = self.x[m]
            for _ in range(STEPS):
                for layer in self.layers:
                    route = self.routes[m]
                    rows, back = await dispatch(self.engine, self.tables[layer], m, x, route, self.turns, 2**30)
                    await back
                    x = combine(self.engine, x, route, rows)

        self.engine.run([task(m) for m in range(self.microbatches)])

    def pure(self) -> None:
        """The experts on their rows."""
        for layer in self._passes():
            self._compute(layer)

    def ceiling(self) -> None:
        """Pack, experts and combine, microbatch after microbatch on the engine's two streams."""
        high, low = self.engine.high, self.engine.low
        for layer in self._passes():
            with torch.cuda.stream(high):
                self._pack()
            with torch.cuda.stream(low):
                low.wait_stream(high)
                self._compute(layer)
            with torch.cuda.stream(high):
                cuda_rows.combine(self.x[0], self.answers, self.places, self.routes[0].weights)

    def lockstep(self) -> None:
        """The usual way."""
        got, back = torch.empty_like(self.rows), torch.empty_like(self.rows)
        for layer in self._passes():
            self._pack()
            dist.all_to_all_single(got, self.rows)
            self._compute(layer)
            dist.all_to_all_single(back, self.answers)
            cuda_rows.combine(self.x[0], back, self.places, self.routes[0].weights)

    def copies(self) -> None:
        """What staging has to copy between the GPU and the host, both ways at once, and nothing else."""
        assert self.host is not None
        copies, gpu, host = Copies(), self.memory.memory.data_ptr(), self.host.own
        nbytes = (self.world.size - 1) * self.tokens * D * DTYPE.itemsize
        for _ in self._passes():
            for _ in ("rows", "answers"):
                copies.to_host(gpu, host, nbytes, lambda: None)
                copies.to_device(host + nbytes, gpu + nbytes, nbytes, lambda: None)
        while any(copies.clocks):
            for clock in copies.clocks:
                clock.look()

    def _pack(self) -> None:
        cuda_rows.gather(self.x[0], self.pairs, self.world.size, self.rows.data_ptr())

    def _passes(self) -> list[int]:
        return [layer for _ in range(STEPS * self.microbatches) for layer in self.layers]

    def _compute(self, layer: int) -> None:
        rows, answers = Rows.of(self.rows), Rows.of(self.answers)
        self.layers[layer]([Batch(rows, answers, (len(rows),))], self.rows.view(-1))

    def time(self, work: Callable[[], None]) -> list[float]:
        """ms per layer and microbatch of every round, the slowest rank's."""
        times = []
        for number in range(ROUNDS + 1):
            torch.cuda.synchronize()
            self.world.Barrier()
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize()
            took = self.world.allreduce(time.perf_counter() - begin, op=MPI.MAX)
            if number:
                times.append(1e3 * took / (STEPS * self.microbatches * LAYERS))
        return times


def exchange(world: MPI.Intracomm, nbytes: int, in_flight: int) -> float:
    """GB/s per direction of messages both ways between two ranks, several at a time."""
    peer, device = 1 - world.rank, torch.cuda.current_device()
    buffers = [torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2 * in_flight)]
    torch.cuda.synchronize()
    best = 0.0
    for _ in range(6):
        world.Barrier()
        begin = time.perf_counter()
        requests = []
        for i, buffer in enumerate(buffers):
            spec = [MPI.buffer.fromaddress(buffer.data_ptr(), nbytes), MPI.BYTE]
            requests.append(world.Irecv(spec, peer, i) if i < in_flight else world.Isend(spec, peer, i - in_flight))
        MPI.Request.Waitall(requests)
        best = max(best, in_flight * nbytes / (time.perf_counter() - begin) / 1e9)
    return best


def peer_copy(nbytes: int) -> float:
    """GB/s of a copy from one GPU to another inside one process."""
    a, b = (torch.ones(nbytes, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2))
    best = 0.0
    for _ in range(6):
        torch.cuda.synchronize(0)
        begin = time.perf_counter()
        for _ in range(4):
            b.copy_(a, non_blocking=True)
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)
        best = max(best, 4 * nbytes / (time.perf_counter() - begin) / 1e9)
    return best


def main() -> None:
    """All of it on every rank; rank 0 writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    world = mpi.start()
    torch.cuda.set_device(world.rank % torch.cuda.device_count())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    dist.init_process_group("nccl", rank=world.rank, world_size=world.size)
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "ranks": world.size,
        "torch": torch.__version__,
        "shape": {"layers": LAYERS, "d": D, "hidden": HIDDEN, "dtype": "bfloat16", "experts": world.size},
        "stack": [],
    }
    sizes = ((1, 1), (1, 3), (4096, 3), (8192, 2), (8192, 3))
    grid = [(tokens, m, exact, False) for exact in (True, False) for tokens, m in sizes]
    with torch.inference_mode():
        for tokens, microbatches, exact, staged in [*grid, (8192, 3, False, True)]:
            bench = Bench(world, exact, staged, tokens, microbatches)
            row = measure(bench)
            bench.engine.free()
            del bench
            results["stack"].append(row)
            if world.rank == 0:
                print(shown(row), flush=True)
            torch.cuda.empty_cache()
        if world.size == 2 and torch.cuda.device_count() == 2:
            results["exchange"] = [
                {"bytes": nbytes, "in_flight": k, "GB/s": exchange(world, nbytes, k)}
                for nbytes in (2**23, 2**26)
                for k in (1, 4)
            ]
            world.Barrier()
            results["peer_copy"] = [{"bytes": b, "GB/s": peer_copy(b)} for b in (2**23, 2**26) if not world.rank]
    world.Barrier()
    if world.rank == 0:
        print(json.dumps({key: results.get(key) for key in ("exchange", "peer_copy")}))
        out.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def measure(bench: Bench) -> dict[str, Any]:
    """One row of the results."""
    names = ["stack"]
    if bench.staged:
        names += ["pure", "copies"]
    elif bench.tokens > 1:
        names += ["pure", "ceiling", "lockstep"]
    times = {name: bench.time(getattr(bench, name)) for name in names}
    return {
        "tokens": bench.tokens,
        "microbatches": bench.microbatches,
        "mode": "exact" if bench.exact else "fast",
        "staged": bench.staged,
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "all": times,
    }


def shown(row: dict[str, Any]) -> str:
    """A row for people."""
    ms = row["ms"]
    text = f"{row['mode']} T={row['tokens']} M={row['microbatches']}{' staged' if row['staged'] else ''}: "
    text += ", ".join(f"{name} {value:.3f}" for name, value in ms.items())
    if "copies" in ms:
        text += f"; slower of pure and copies / stack {max(ms['pure'], ms['copies']) / ms['stack']:.3f}"
    if "ceiling" in ms:
        text += f"; of pure {ms['pure'] / ms['stack']:.3f}, of ceiling {ms['ceiling'] / ms['stack']:.3f}"
        text += f", lockstep / stack {ms['lockstep'] / ms['stack']:.3f}"
    return text


if __name__ == "__main__":
    mpi.guard(main)
