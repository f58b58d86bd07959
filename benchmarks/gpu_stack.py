"""A stack of MoE layers on GPUs, one expert per GPU, every token to all of them: how much of the experts' rate is left.

    python -m moempi.launch -n 2 -- python benchmarks/gpu_stack.py --out benchmarks/results/gpu_stack.json

The stack is that of `moempi bench layer`: microbatches go through the layers with the engine, messages and kernels of
`moempi run`. Beside it, in the same process and on the same rows:

- pure: the experts alone, on as many rows as they get.
- ceiling: sort, pack, experts and combine on the same streams and with as many microbatches, nothing sent.
- lockstep: sort, pack, `all_to_all_single` of NCCL, experts, `all_to_all_single`, combine, a layer after the other.
- copies: of a staged run, what goes between GPU and host, both ways at once and nothing else.

Times are ms per layer and microbatch, the slowest rank's, medians of the rounds. With two GPUs also the exchange alone:
messages both ways at once, beside a copy from one GPU to the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multi_gpu_stack import end, maker

from moempi import mpi
from moempi.bench.stack import Stack, sum_up
from moempi.cli.measuring import start_mpi

LAYERS, D, HIDDEN = 6, 7168, 2048
ROUNDS, PASSES = 7, 2
# Tokens and microbatches: the host's part, then what a GPU is for.
SIZES = (1, 1), (1, 3), (4096, 3), (8192, 2), (8192, 3)
MESSAGES = 2**23, 2**26  # bytes


def main() -> None:
    """All of it on every rank; rank 0 writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trace", type=Path, help="of one more round of the last stack that is not staged")
    parser.add_argument("--small", action="store_true", help="a trial of this script on the CPU, in small")
    given = parser.parse_args()
    device = "cpu" if given.small else "cuda"
    world = start_mpi(device)
    import torch

    make, about = maker(world, device, PASSES)
    results: dict[str, Any] = {**about, "ranks": world.size, "stack": []}

    def write() -> None:
        if world.rank == 0:
            given.out.write_text(json.dumps(results, indent=1) + "\n")

    with torch.inference_mode():
        stacks = small_grid(world.size) if given.small else grid(world.size)
        last = max(i for i, (stack, _) in enumerate(stacks) if stack.gpu_aware != "off")
        for i, (stack, tokens) in enumerate(stacks):
            trace = given.trace if i == last else None
            results["stack"].append(measure(world, make, stack, tokens, trace))
            write()
            if world.rank == 0:
                print(shown(results["stack"][-1]), flush=True)
    if world.size == 2 and not given.small and torch.cuda.device_count() == 2:
        results |= measure_exchange(world)
        write()
    end(device)
    mpi.meet(world)


def grid(ranks: int) -> list[tuple[Stack, int]]:
    """Stacks and the tokens of their microbatches; the last one is staged through the host."""

    def stack(microbatches: int, mode: str, gpu_aware: str = "on") -> Stack:
        return Stack(LAYERS, D, HIDDEN, ranks, ranks, microbatches, mode=mode, gpu_aware=gpu_aware)

    found = [(stack(m, mode), tokens) for mode in ("exact", "fast") for tokens, m in SIZES]
    return [*found, (stack(3, "fast", "off"), 8192)]


def small_grid(ranks: int) -> list[tuple[Stack, int]]:
    """For a trial."""
    return [(Stack(2, 64, 32, ranks, ranks, m), tokens) for tokens, m in ((1, 1), (40, 3))]


def measure(world: Any, make: Any, stack: Stack, tokens: int, trace: Path | None) -> dict[str, Any]:
    """One row of the results. Collective."""
    from moempi.bench.layers import measure_layers, trace_round
    from moempi.exchange.topology import look_around

    layers = make(stack, tokens)
    if tokens == 1:
        layers.measured = ("stack",)
    elif stack.gpu_aware == "off":
        layers.copies = copies_of(world, layers)
        layers.measured = ("stack", "pure", "copies")
    times = measure_layers(world, layers, stack.layers, ROUNDS)
    if trace:
        trace_round(look_around(world), layers, stack, tokens, trace)
    layers.free()
    return {**vars(stack), **sum_up(stack, world.size, tokens, times)}


def copies_of(world: Any, layers: Any) -> Callable[[], None]:
    """What staging has to copy between the GPU and the host in a round, both ways at once, and nothing else."""
    import torch

    from moempi.device.cuda_transfer import Copies

    nbytes, way = (world.size - 1) * layers.x[0].nbytes, Copies()
    # Rows go and answers come; for the other ranks it is the other way round.
    times = 2 * layers.passes * layers.shape.layers * layers.shape.microbatches
    gpu = torch.empty(2 * nbytes, dtype=torch.uint8, device=layers.device)
    host = torch.empty(2 * nbytes, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        for _ in range(times):
            way.to_host(gpu.data_ptr(), host.data_ptr(), nbytes, lambda: None)
            way.to_device(host.data_ptr() + nbytes, gpu.data_ptr() + nbytes, nbytes, lambda: None)
        while any(way.clocks):
            for clock in way.clocks:
                clock.look()

    return copy


def measure_exchange(world: Any) -> dict[str, Any]:
    """Messages between two GPUs, and copies. Collective."""
    found = [
        {"bytes": nbytes, "in_flight": k, "GB/s": exchange(world, nbytes, k)} for nbytes in MESSAGES for k in (1, 4)
    ]
    world.Barrier()
    copied = [{"bytes": nbytes, "GB/s": peer_copy(nbytes)} for nbytes in MESSAGES if not world.rank]
    world.Barrier()
    if world.rank == 0:
        print(json.dumps({"exchange": found, "peer_copy": copied}), flush=True)
    return {"exchange": found, "peer_copy": copied}


def exchange(world: Any, nbytes: int, in_flight: int) -> float:
    """GB/s per direction of messages both ways between two ranks, several at a time."""
    import torch
    from mpi4py import MPI

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
    import torch

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


def shown(row: dict[str, Any]) -> str:
    """A row for people."""
    ms, staged = row["ms"], " staged" if row["gpu_aware"] == "off" else ""
    text = f"{row['mode']} T={row['tokens']} M={row['microbatches']}{staged}: "
    text += ", ".join(f"{name} {value:.3f}" for name, value in ms.items())
    others = [name for name in ms if name != "stack"]
    if "copies" in ms:
        return text + f"; slower of pure and copies / stack {max(ms['pure'], ms['copies']) / ms['stack']:.3f}"
    return text + "".join(f"; {name} / stack {ms[name] / ms['stack']:.3f}" for name in others)


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
