"""`moempi bench layer`: every number of tokens in turn, on whatever the ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moempi.bench.layers import CpuLayers, measure_layers, trace_round
from moempi.bench.stack import Stack, sum_up
from moempi.exchange.topology import Topology, look_around

if TYPE_CHECKING:
    from mpi4py import MPI


def run_layers(
    world: MPI.Intracomm,
    stack: Stack,
    tokens: Sequence[int],
    *,
    device: str,
    rounds: int,
    passes: int,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measure a stack; the results, whole on every rank. Collective.

    Args:
        tokens: of a microbatch, one measurement each.
        device: "cpu" or "cuda".
        trace: where that of one more round goes, with the last number of tokens.
    """
    topology = look_around(world)
    found: list[dict[str, Any]] = []
    of_trace: dict[str, float] = {}
    with torch.inference_mode():
        make, about = _on_gpu(topology, stack) if device == "cuda" else _on_cpu(topology, stack)
        for i, each in enumerate(tokens, 1):
            layers = make(each, passes)
            times = measure_layers(world, layers, stack.layers, rounds)
            if trace and i == len(tokens):
                of_trace["ms_of_trace"] = trace_round(topology, layers, stack, each, trace)
            layers.free()
            found.append(sum_up(stack, world.size, each, times))
    hosts = sorted(set(topology.hosts))
    return {"ranks": world.size, "hosts": hosts, **about, "stack": asdict(stack), "results": found, **of_trace}


def _on_cpu(topology: Topology, stack: Stack) -> tuple[Any, dict[str, Any]]:
    from moempi.device.cpu import Cpu

    device = Cpu(topology.threads)
    about = {"device": "cpu", "threads": device.threads, "torch": torch.__version__}
    return (lambda tokens, passes: CpuLayers(topology, device, stack, tokens, passes)), about


def _on_gpu(topology: Topology, stack: Stack) -> tuple[Any, dict[str, Any]]:
    from moempi.bench.gpu import take_gpu
    from moempi.exchange.gpu_aware import choose_way

    index = take_gpu(topology)
    from moempi.bench.layers_cuda import CudaLayers
    from moempi.device.cuda import Cuda

    way, device = choose_way(topology, stack.gpu_aware), Cuda(index, stack.mode)
    about = {"device": device.describe(), "messages": str(way), "torch": torch.__version__}
    staged = way.staged
    return (lambda tokens, passes: CudaLayers(topology, device, stack, tokens, passes, staged=staged)), about
