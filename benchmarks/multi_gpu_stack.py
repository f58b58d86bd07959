"""One rank of multi_gpu.py's stacks: `moempi bench layer` for several shapes, with NCCL in lockstep beside it.

Lockstep is the usual way: pack, `all_to_all_single`, experts, `all_to_all_single`, combine, a layer after the other,
on one stream, with the same experts, routes and kernels. The sizes of its messages are known beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from moempi import mpi
from moempi.bench.stack import Stack, sum_up
from moempi.cli.measuring import start_mpi

PORT = "29517"


def main() -> None:
    """All shapes and sizes; rank 0 writes after each."""
    given = _arguments()
    deadline = time.monotonic() + given.seconds
    world = start_mpi(given.device)
    import torch

    from moempi.bench.layers import measure_layers

    make, about = maker(world, given.device, given.passes)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for stack in stacks(given):
            rows: list[dict[str, Any]] = []
            results.append({**about, "ranks": world.size, "stack": vars(stack), "results": rows})
            # Of packed experts a token sends four times the rows: the largest size is left to those that have time.
            for tokens in given.tokens:
                if world.bcast(time.monotonic() > deadline, root=0):
                    break
                layers = make(stack, tokens)
                times = measure_layers(world, layers, stack.layers, given.rounds)
                layers.free()
                rows.append(sum_up(stack, world.size, tokens, times))
                if world.rank == 0:
                    given.out.write_text(json.dumps(results, indent=1) + "\n")
    end(given.device)
    mpi.meet(world)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", nargs="+", required=True, help="experts x top-k: 8x2 64x8")
    parser.add_argument("--tokens", nargs="+", type=int, required=True)
    parser.add_argument("--d-model", type=int, required=True)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--mode", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--microbatches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=300.0, help="no further size is begun after these")
    return parser.parse_args()


def stacks(given: argparse.Namespace) -> list[Stack]:
    """The shapes in the mode that is asked for, and the first of them in exact mode too."""
    found = []
    for shape in given.shapes:
        experts, top_k = map(int, shape.split("x"))
        found.append(Stack(given.layers, given.d_model, given.hidden, experts, top_k, given.microbatches,
                           mode=given.mode, gpu_aware="on"))  # fmt: skip
    return found if given.mode == "exact" else [*found, replace(found[0], mode="exact")]


def maker(world: Any, on: str, passes: int) -> tuple[Any, dict[str, Any]]:
    """What builds the layers of a shape on this rank, and what the results say of the device. Collective.

    Args:
        world: of one host.
        on: cpu or cuda; on GPUs lockstep is measured too, and `end` has to be called.
        passes: of every microbatch through all layers in a round.
    """
    from moempi.exchange.topology import look_around

    topology = look_around(world)
    if on == "cpu":
        from moempi.bench.layers import CpuLayers
        from moempi.device.cpu import Cpu

        device = Cpu(topology.threads)
        return (lambda stack, tokens: CpuLayers(topology, device, stack, tokens, passes)), {"device": "cpu"}
    from moempi.bench.gpu import take_gpu

    index = take_gpu(topology)
    import torch
    import torch.distributed as dist

    from moempi.exchange.gpu_aware import choose_way

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    dist.init_process_group("nccl", rank=world.rank, world_size=world.size)
    from multi_gpu_lockstep import WithLockstep

    from moempi.device.cuda import Cuda

    def make(stack: Stack, tokens: int) -> Any:
        staged = choose_way(topology, stack.gpu_aware).staged
        return WithLockstep(topology, Cuda(index, stack.mode), stack, tokens, passes, staged=staged)

    return make, {"device": Cuda(index, "fast").describe(), "torch": torch.__version__}


def end(device: str) -> None:
    """End what `maker` has begun. Collective."""
    if device == "cuda":
        import torch.distributed as dist

        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(mpi.guard(main))
